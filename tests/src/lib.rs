//! Tests of the whole: end to end, differential, and the house style. There is no library here.
