//! The Pinfold micro-VMM.
