//! HTTP on a unix socket to actions and back.
//!
//! [`Server`] turns requests of Firecracker's API, with Pinfold's additions, into [`resources::Action`]s and their
//! outcomes into replies. It decides nothing: what an action does, and whether it can be done now, is up to whoever
//! gets it. [`Client`] asks such a server; `pinctl` is its command line. `resources/assets/openapi.json` describes
//! the API.

mod client;
mod connection;
mod reply;
mod routes;
mod server;

#[cfg(test)]
mod openapi_properties;
#[cfg(test)]
mod openapi_tests;

pub use client::{Client, ClientError};
pub use hyper::Method;
pub use routes::{Request, parse};
pub use server::{Handler, Limits, Prepared, Responder, Server, ServerError};
