//! Configuration, control socket and statistics export of the switch.
