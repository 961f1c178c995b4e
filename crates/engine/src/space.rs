//! Address spaces of other processes.
