//! What an x86_64 microVM looks like to its guest.
