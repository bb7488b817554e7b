//! A burst of frames, borrowed from the queue that they came from.

use virtq::mem::{ReadPiece, Reader, SegStore};

use crate::{BURST_MAX, Frame, QueueFault};

/// Storage for one burst of frames; a worker allocates it once.
#[derive(Debug)]
pub struct FrameBuf {
    frames: Box<[Frame]>,
    len: usize,
    /// How many frames the next burst may have.
    most: usize,
}

impl Default for FrameBuf {
    fn default() -> Self {
        Self { frames: vec![Frame::default(); BURST_MAX].into(), len: 0, most: BURST_MAX }
    }
}

impl FrameBuf {
    /// Forgets all frames.
    #[inline(always)]
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Lets the next burst have so many frames at most, and at least one.
    #[inline(always)]
    pub fn limit(&mut self, most: usize) {
        self.most = most;
    }

    /// Begins a burst: forgets all frames. Returns how many an ingress may take.
    #[inline(always)]
    pub fn begin(&mut self) -> usize {
        self.len = 0;
        std::mem::replace(&mut self.most, BURST_MAX).clamp(1, BURST_MAX)
    }

    /// The frame after the last one, to be filled and then kept with [`Self::keep`].
    #[inline(always)]
    pub fn slot(&mut self) -> Option<&mut Frame> {
        self.frames.get_mut(self.len)
    }

    /// Keeps what stands in the slot.
    #[inline(always)]
    pub fn keep(&mut self) {
        self.len = self.len.wrapping_add(1).min(self.frames.len());
    }

    /// All frames after the last one, to be filled from the first on and then kept with
    /// [`Self::keep_many`].
    #[inline(always)]
    pub fn room(&mut self) -> &mut [Frame] {
        self.frames.get_mut(self.len..).unwrap_or_default()
    }

    /// Keeps the first `count` frames of [`Self::room`].
    #[inline(always)]
    pub fn keep_many(&mut self, count: usize) {
        self.len = self.len.saturating_add(count).min(self.frames.len());
    }

    /// Number of kept frames.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no frame is kept.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The kept frames as a batch whose bodies are in `store`.
    #[inline(always)]
    pub fn batch<'a>(&'a mut self, store: SegStore<'a>, fault: Option<QueueFault>) -> Batch<'a> {
        let frames = self.frames.get_mut(..self.len).unwrap_or_default();
        Batch { frames, store, fault }
    }
}

/// A burst of frames. It borrows its ingress, and so keeps the memory of the bodies mapped and
/// forbids another `receive` before it is gone.
#[derive(Debug)]
pub struct Batch<'a> {
    frames: &'a mut [Frame],
    store: SegStore<'a>,
    fault: Option<QueueFault>,
}

impl<'a> Batch<'a> {
    /// Number of frames.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether nothing arrived.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// The frames.
    #[inline(always)]
    pub fn frames(&self) -> &[Frame] {
        self.frames
    }

    /// The frames, to edit.
    #[inline(always)]
    pub fn frames_mut(&mut self) -> &mut [Frame] {
        self.frames
    }

    /// Forgets the frames after the first `len`.
    pub fn truncate(&mut self, len: usize) {
        let frames = std::mem::take(&mut self.frames);
        self.frames = frames.get_mut(..len.min(frames.len())).unwrap_or_default();
    }

    /// What the bodies are in.
    #[inline(always)]
    pub fn store(&self) -> SegStore<'a> {
        self.store
    }

    /// Keeps only the frames that `keep` wants, in their order. It is given each one's index.
    pub fn retain(&mut self, mut keep: impl FnMut(usize, &Frame) -> bool) {
        let mut kept = 0usize;
        for index in 0..self.frames.len() {
            if self.frames.get(index).is_some_and(|frame| keep(index, frame)) {
                self.frames.swap(kept, index);
                kept = kept.saturating_add(1);
            }
        }
        let frames = std::mem::take(&mut self.frames);
        self.frames = frames.get_mut(..kept).unwrap_or_default();
    }

    /// A reader over the body of `frame`, one of this batch.
    #[inline(always)]
    pub fn body(&self, frame: &Frame) -> Reader<'a> {
        self.store.reader(frame.body)
    }

    /// The body of `frame`, one of this batch, if it is in one piece.
    #[inline(always)]
    pub fn body_piece(&self, frame: &Frame) -> Option<ReadPiece<'a>> {
        self.store.one(frame.body)
    }

    /// The fault that ended the burst: the queue gives nothing more until it is set up anew.
    pub fn fault(&self) -> Option<&QueueFault> {
        self.fault.as_ref()
    }
}
