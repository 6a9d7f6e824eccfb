//! A bar chart of ratios as an SVG image, for the documentation.

use std::fmt::Write;

/// One bar.
pub(crate) struct Bar {
    /// Which panel it is in.
    pub(crate) panel: String,
    /// What stands before it.
    pub(crate) label: String,
    /// How long it is: 1 is as fast as the peer.
    pub(crate) ratio: f64,
    /// The smallest and the largest ratio that were measured.
    pub(crate) range: (f64, f64),
}

const WIDTH: f64 = 760.0;
const LEFT: f64 = 210.0;
const RIGHT: f64 = 60.0;
const BAR: f64 = 16.0;
const STEP: f64 = 22.0;
const TOP: f64 = 44.0;
const PANEL_GAP: f64 = 30.0;

/// The chart: a panel for each size, a line where both are equal.
pub(crate) fn svg(title: &str, bars: &[Bar]) -> String {
    let longest = bars.iter().map(|bar| bar.range.1).fold(2.0, f64::max);
    let scale = (WIDTH - LEFT - RIGHT) / longest;
    let mut body = String::new();
    let mut y = TOP;
    let mut panel = "";
    for bar in bars {
        if bar.panel != panel {
            panel = &bar.panel;
            y += if y > TOP { PANEL_GAP } else { 0.0 };
            text(&mut body, 10.0, y + 12.0, "bold", panel);
            y += STEP;
        }
        let middle = y + BAR / 2.0;
        text(&mut body, 10.0, y + 12.0, "normal", &bar.label);
        let width = bar.ratio * scale;
        let _ = writeln!(
            body,
            r##"<rect x="{LEFT}" y="{y}" width="{width:.1}" height="{BAR}" fill="#3b6ea5"/>"##
        );
        let (from, to) = (LEFT + bar.range.0 * scale, LEFT + bar.range.1 * scale);
        let _ = writeln!(
            body,
            r##"<path d="M{from:.1} {middle}H{to:.1}" stroke="#1b1b1b" stroke-width="2"/>"##
        );
        let after = LEFT + width.max(bar.range.1 * scale) + 6.0;
        text(
            &mut body,
            after,
            y + 12.0,
            "normal",
            &format!("{:.2}", bar.ratio),
        );
        y += STEP;
    }
    let one = LEFT + scale;
    let _ = writeln!(
        body,
        r##"<path d="M{one:.1} {TOP}V{y}" stroke="#b03030" stroke-dasharray="4 3"/>"##
    );
    let height = y + 16.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"24\" font-size=\"15\" font-weight=\"bold\">{title}</text>\n\
         {body}</svg>\n"
    )
}

fn text(body: &mut String, x: f64, y: f64, weight: &str, text: &str) {
    let _ = writeln!(
        body,
        r#"<text x="{x:.1}" y="{y:.1}" font-weight="{weight}">{text}</text>"#
    );
}
