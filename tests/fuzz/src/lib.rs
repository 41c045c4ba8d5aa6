//! What fuzz targets share: limits on time and memory that are failures when they are passed, and random numbers for
//! mutators.

pub mod guard;
pub mod heap;
pub mod random;
