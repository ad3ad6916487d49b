//! Machines whose CPU state moves between engines: at hand-overs, and instruction by instruction where
//! an engine refuses some.

mod assisted;
mod bare;
mod guest;
mod kvm_refuses;
mod refuser;
mod relayed;
mod shutdown;
