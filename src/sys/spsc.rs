//! A bounded ring from one thread to one other, without a lock and without a read-modify-write.
//!
//! Neither side waits: `push` gives back what there is no room for, `pop` answers `None`. What is
//! still inside when both ends are gone is dropped with them. [`channel`] makes one; a loom model
//! below runs it as it is.

use std::sync::Arc;

use crossbeam::utils::CachePadded;

use crate::sync::{AtomicUsize, Cell, Ordering};

/// What both ends share.
struct Ring<T> {
    places: Box<[Cell<Option<T>>]>,
    /// Items taken so far. Written by the consumer.
    taken: CachePadded<AtomicUsize>,
    /// Items put in so far. Written by the producer.
    put: CachePadded<AtomicUsize>,
}

// SAFETY: a place is accessed by one side at a time: those from `taken` up to `put` by the
// consumer, the others by the producer. The indices hand them over with release and acquire.
unsafe impl<T: Send> Sync for Ring<T> {}
// SAFETY: the ring owns its items, which may be sent.
unsafe impl<T: Send> Send for Ring<T> {}

/// The end that puts in.
pub struct Producer<T> {
    ring: Arc<Ring<T>>,
    put: usize,
    /// `taken` as last read.
    taken: usize,
}

/// The end that takes out.
pub struct Consumer<T> {
    ring: Arc<Ring<T>>,
    taken: usize,
    /// `put` as last read.
    put: usize,
}

/// A ring with room for `capacity` items, one at least.
pub fn channel<T: Send>(capacity: usize) -> (Producer<T>, Consumer<T>) {
    let ring = Arc::new(Ring {
        places: (0..capacity.max(1)).map(|_| Cell::new(None)).collect(),
        taken: CachePadded::new(AtomicUsize::new(0)),
        put: CachePadded::new(AtomicUsize::new(0)),
    });
    let producer = Producer {
        ring: Arc::clone(&ring),
        put: 0,
        taken: 0,
    };
    let consumer = Consumer {
        ring,
        taken: 0,
        put: 0,
    };
    (producer, consumer)
}

impl<T> Ring<T> {
    /// The place of item `number`.
    fn place(&self, number: usize) -> &Cell<Option<T>> {
        &self.places[number % self.places.len()]
    }
}

impl<T> Producer<T> {
    /// Puts `item` in.
    ///
    /// # Errors
    /// The item, when there is no room.
    #[inline]
    pub fn push(&mut self, item: T) -> Result<(), T> {
        let capacity = self.ring.places.len();
        if self.put.wrapping_sub(self.taken) == capacity {
            // Acquire: pairs with the consumer's release, so that it is done with the place.
            self.taken = self.ring.taken.load(Ordering::Acquire);
            if self.put.wrapping_sub(self.taken) == capacity {
                return Err(item);
            }
        }
        // SAFETY: the place is not among those between `taken` and `put`: ours alone.
        self.ring
            .place(self.put)
            .with_mut(|place| unsafe { *place = Some(item) });
        self.put = self.put.wrapping_add(1);
        // Release: whoever sees the index sees the item.
        self.ring.put.store(self.put, Ordering::Release);
        Ok(())
    }
}

impl<T> Consumer<T> {
    /// Whether nothing is there.
    #[inline]
    pub fn is_empty(&mut self) -> bool {
        if self.taken == self.put {
            // Acquire: pairs with the producer's release, so that we see the items.
            self.put = self.ring.put.load(Ordering::Acquire);
        }
        self.taken == self.put
    }

    /// Takes the oldest item.
    #[inline]
    pub fn pop(&mut self) -> Option<T> {
        if self.is_empty() {
            return None;
        }
        // SAFETY: the place is among those between `taken` and `put`: ours alone.
        let item = self
            .ring
            .place(self.taken)
            .with_mut(|place| unsafe { (*place).take() });
        self.taken = self.taken.wrapping_add(1);
        // Release: the producer must not fill the place before we have emptied it.
        self.ring.taken.store(self.taken, Ordering::Release);
        item
    }
}

impl<T> core::fmt::Debug for Producer<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Producer").field("put", &self.put).finish()
    }
}

impl<T> core::fmt::Debug for Consumer<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Consumer")
            .field("taken", &self.taken)
            .finish()
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn items_come_out_in_order_and_a_full_ring_gives_them_back() {
        let (mut producer, mut consumer) = channel(3);
        assert!(consumer.is_empty());
        for lap in 0..10 {
            for item in 0..3 {
                assert_eq!(producer.push(lap * 3 + item), Ok(()));
            }
            assert_eq!(producer.push(99), Err(99));
            for item in 0..3 {
                assert_eq!(consumer.pop(), Some(lap * 3 + item));
            }
            assert_eq!(consumer.pop(), None);
        }
    }

    #[test]
    fn what_is_left_inside_is_dropped() {
        let item = Arc::new(());
        let (mut producer, consumer) = channel(2);
        producer.push(Arc::clone(&item)).unwrap();
        drop(producer);
        drop(consumer);
        assert_eq!(Arc::strong_count(&item), 1);
    }

    #[test]
    fn two_threads_lose_nothing() {
        let (mut producer, mut consumer) = channel(4);
        let thread = std::thread::spawn(move || {
            for item in 0..100_000u64 {
                let mut item = Box::new(item);
                while let Err(back) = producer.push(item) {
                    item = back;
                    std::hint::spin_loop();
                }
            }
        });
        for want in 0..100_000 {
            let got = loop {
                if let Some(got) = consumer.pop() {
                    break got;
                }
                std::hint::spin_loop();
            };
            assert_eq!(*got, want);
        }
        thread.join().unwrap();
    }
}

#[cfg(test)]
#[cfg(loom)]
mod loom_tests {
    use super::*;

    /// loom's cells complain of two sides at one place, its model of a load that sees too little.
    #[test]
    fn loom_spsc_hands_every_item_over_once_and_in_order() {
        loom::model(|| {
            let (mut producer, mut consumer) = channel(2);
            let thread = loom::thread::spawn(move || {
                let mut done = 0;
                for item in 0..3 {
                    match producer.push(item) {
                        Ok(()) => done += 1,
                        Err(_) => break,
                    }
                }
                done
            });
            let mut got = Vec::new();
            for _ in 0..3 {
                got.extend(consumer.pop());
            }
            let put = thread.join().unwrap();
            got.extend(core::iter::from_fn(|| consumer.pop()));
            assert_eq!(got, (0..put).collect::<Vec<_>>());
        });
    }
}
