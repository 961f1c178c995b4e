//! Values of the engine that are dropped without the GIL.

use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};

use pyo3::prelude::*;

/// Value whose drop takes long, because it frees much memory or joins threads. Such a thread may wait for a page that
/// Python must load.
pub struct Detached<T: Send>(ManuallyDrop<T>);

impl<T: Send> From<T> for Detached<T> {
    fn from(value: T) -> Self {
        Self(ManuallyDrop::new(value))
    }
}

impl<T: Send> Deref for Detached<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Send> DerefMut for Detached<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T: Send> Drop for Detached<T> {
    fn drop(&mut self) {
        // SAFETY: this is the only place that takes the value, and nothing uses `self` afterwards.
        let value = unsafe { ManuallyDrop::take(&mut self.0) };
        // If the interpreter is being finalised, the closure is not called, and the value is dropped with it.
        Python::try_attach(|py| py.detach(|| drop(value)));
    }
}
