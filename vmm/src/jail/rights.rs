//! What a jailed process may still do.

use rustix::process::{Gid, Resource, Rlimit, Uid, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::JailError;
use super::args::Limit;

/// Descriptors that may be open, unless a limit says otherwise.
const DESCRIPTORS: u64 = 2048;

fn call(doing: &'static str) -> impl Fn(rustix::io::Errno) -> JailError {
    move |error| JailError::Call { doing, source: error.into() }
}

/// Sets the limits, of which later ones go before earlier ones.
pub fn limit(limits: &[Limit]) -> Result<(), JailError> {
    let set = |limit: &Limit| {
        let (resource, value, doing) = match *limit {
            Limit::FileSize(bytes) => (Resource::Fsize, bytes, "set --resource-limit fsize"),
            Limit::Descriptors(count) => (Resource::Nofile, count, "set --resource-limit no-file"),
        };
        setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) }).map_err(call(doing))
    };
    [Limit::Descriptors(DESCRIPTORS)].iter().chain(limits).try_for_each(set)
}

/// Makes this process, which has one thread, the user's, for good: without other groups, without capabilities, even as
/// user 0, and without a way to new ones.
pub fn give_up(uid: u32, gid: u32) -> Result<(), JailError> {
    for number in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            // The kernel has no more.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(call("give up capabilities (PR_CAPBSET_DROP)")(error)),
        }
    }
    clear_ambient_capability_set().map_err(call("give up ambient capabilities"))?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_thread_groups(&[]).map_err(call("leave all groups (setgroups)"))?;
    set_thread_res_gid(gid, gid, gid).map_err(call("become --gid (setresgid)"))?;
    set_thread_res_uid(uid, uid, uid).map_err(call("become --uid (setresuid)"))?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).map_err(call("give up capabilities (capset)"))?;
    set_no_new_privs(true).map_err(call("give up new privileges (PR_SET_NO_NEW_PRIVS)"))
}
