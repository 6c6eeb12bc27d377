//! From a request's method, path and body to an [`Action`]: one table, which the OpenAPI document is checked against.

use std::ops::RangeInclusive;

use hyper::Method;
use resources::{
    Action, Bandwidth, CgroupPatch, Container, CpuSet, DiagnosisQuery, EventsQuery, Fault, MachineConfig,
    MachineConfigPatch, MmdsConfig, MmdsVersion, ResourceId, VmState, Vsock, WhatIfQuery,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// What a request asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The action.
    pub action: Action,
    /// Whether it uses what Firecracker has deprecated, which the reply says in a header.
    pub deprecated: bool,
}

impl From<Action> for Request {
    fn from(action: Action) -> Self {
        Self { action, deprecated: false }
    }
}

/// What answers a path and method.
pub(crate) struct Route {
    pub(crate) method: Method,
    /// A segment in braces stands for an id.
    pub(crate) path: &'static str,
    take: Take,
}

/// How a request becomes an action.
enum Take {
    /// There is no body.
    Bare(Action),
    /// From the body.
    Body(fn(&Input<'_>) -> Result<Request, Fault>),
    /// There is no body; from the id in the path.
    Named(fn(&str) -> Result<Action, Fault>),
    /// There is no body; from the query, which may be empty.
    Query(fn(&str) -> Result<Action, Fault>),
    /// Firecracker's design or ours has it, this version does not; what it is called.
    NotYet(&'static str),
}

const fn get(path: &'static str, action: Action) -> Route {
    Route { method: Method::GET, path, take: Take::Bare(action) }
}

const fn put(path: &'static str, take: fn(&Input<'_>) -> Result<Request, Fault>) -> Route {
    Route { method: Method::PUT, path, take: Take::Body(take) }
}

const fn patch(path: &'static str, take: fn(&Input<'_>) -> Result<Request, Fault>) -> Route {
    Route { method: Method::PATCH, path, take: Take::Body(take) }
}

const fn query(path: &'static str, take: fn(&str) -> Result<Action, Fault>) -> Route {
    Route { method: Method::GET, path, take: Take::Query(take) }
}

const fn not_yet(method: Method, path: &'static str, name: &'static str) -> Route {
    Route { method, path, take: Take::NotYet(name) }
}

/// How long a client can wait for events, in milliseconds.
const MAX_EVENTS_TIMEOUT_MS: u64 = 60_000;

/// How long the microVM can be observed for an answer, in milliseconds.
const WINDOWS_MS: RangeInclusive<u64> = 100..=60_000;

/// How long it is observed for a diagnosis by default, and for an estimate of other limits.
const DIAGNOSIS_MS: u64 = 1000;
const WHAT_IF_MS: u64 = 2000;

/// All that the API has.
pub(crate) static ROUTES: &[Route] = &[
    get("/", Action::GetInstance),
    get("/version", Action::GetVersion),
    get("/vm/config", Action::GetConfig),
    get("/machine-config", Action::GetMachineConfig),
    get("/balloon", Action::GetBalloon),
    get("/balloon/statistics", Action::GetBalloonStats),
    get("/mmds", Action::GetMmds),
    get("/cgroup", Action::GetCgroup),
    get("/cgroup/threads", Action::GetCgroupThreads),
    get("/cgroup/stats", Action::GetCgroupStats),
    query("/cgroup/events", events_query),
    query("/cgroup/diagnosis", diagnosis_query),
    query("/cgroup/what-if", what_if_query),
    get("/metrics/prometheus", Action::GetPrometheus),
    put("/actions", put_action),
    put("/boot-source", |input| Ok(Action::PutBootSource(input.read()?).into())),
    put("/machine-config", put_machine_config),
    put("/cpu-config", |input| Ok(Action::PutCpuConfig(input.read()?).into())),
    put("/drives/{drive_id}", |input| {
        Ok(Action::PutDrive(input.read_named(|drive: &resources::Drive| &drive.drive_id)?).into())
    }),
    put("/network-interfaces/{iface_id}", |input| {
        let interface = input.read_named(|interface: &resources::NetworkInterface| &interface.iface_id)?;
        Ok(Action::PutNetworkInterface(interface).into())
    }),
    put("/vsock", put_vsock),
    put("/entropy", |input| Ok(Action::PutEntropy(input.read()?).into())),
    put("/fs/{tag}", |input| Ok(Action::PutFs(input.read_named(|fs: &resources::Fs| &fs.tag)?).into())),
    put("/serial", |input| Ok(Action::PutSerial(input.read()?).into())),
    put("/logger", |input| Ok(Action::PutLogger(input.read()?).into())),
    put("/metrics", |input| Ok(Action::PutMetrics(input.read()?).into())),
    put("/balloon", |input| Ok(Action::PutBalloon(input.read()?).into())),
    put("/mmds", |input| Ok(Action::PutMmds(input.read_any()?).into())),
    put("/mmds/config", put_mmds_config),
    put("/cgroup", |input| Ok(Action::PutCgroup(input.read()?).into())),
    put("/cgroup/containers/{id}", put_container),
    patch("/cgroup", patch_cgroup),
    patch("/cgroup/overhead", |input| Ok(Action::PatchOverhead(input.read()?).into())),
    Route { method: Method::DELETE, path: "/cgroup/containers/{id}", take: Take::Named(delete_container) },
    patch("/machine-config", patch_machine_config),
    patch("/drives/{drive_id}", |input| {
        Ok(Action::PatchDrive(input.read_named(|patch: &resources::DrivePatch| &patch.drive_id)?).into())
    }),
    patch("/network-interfaces/{iface_id}", |input| {
        let patch = input.read_named(|patch: &resources::NetworkInterfacePatch| &patch.iface_id)?;
        Ok(Action::PatchNetworkInterface(patch).into())
    }),
    patch("/balloon", |input| Ok(Action::PatchBalloon(input.read()?).into())),
    patch("/balloon/statistics", |input| Ok(Action::PatchBalloonStats(input.read()?).into())),
    patch("/mmds", |input| Ok(Action::PatchMmds(input.read_any()?).into())),
    patch("/vm", |input| Ok(Action::SetVmState(input.read::<VmStateBody>()?.state).into())),
    not_yet(Method::PUT, "/snapshot/create", "taking a snapshot"),
    not_yet(Method::PUT, "/snapshot/load", "loading a snapshot"),
    not_yet(Method::GET, "/hotplug/memory", "memory hotplug"),
    not_yet(Method::PUT, "/hotplug/memory", "memory hotplug"),
    not_yet(Method::PATCH, "/hotplug/memory", "memory hotplug"),
    not_yet(Method::PUT, "/pmem/{id}", "persistent memory"),
    not_yet(Method::PATCH, "/pmem/{id}", "persistent memory"),
    not_yet(Method::DELETE, "/pmem/{id}", "persistent memory"),
    not_yet(Method::DELETE, "/drives/{drive_id}", "removal of a drive"),
    not_yet(Method::DELETE, "/network-interfaces/{iface_id}", "removal of a network interface"),
    not_yet(Method::PATCH, "/balloon/hinting/start", "hinting of free pages"),
    not_yet(Method::PATCH, "/balloon/hinting/stop", "hinting of free pages"),
    not_yet(Method::GET, "/balloon/hinting/status", "hinting of free pages"),
];

/// What a request of `method` on `path` (with its query, if any) and this body asks for.
///
/// # Errors
/// A fault with Firecracker's text where it has one. What a later version has is refused by its name. A field that
/// is wrong or that nobody knows is named by its path in the body.
pub fn parse(method: &Method, path: &str, body: &[u8]) -> Result<Request, Fault> {
    if *method == Method::GET && !body.is_empty() {
        return Err(fault("GET request cannot have a body."));
    }
    let (plain, query) = path.split_once('?').map_or((path, None), |(plain, query)| (plain, Some(query)));
    let found = ROUTES.iter().find_map(|route| Some((route, route.matches(method, plain)?)));
    if let Some((Route { take: Take::NotYet(name), path, .. }, _)) = found {
        return Err(fault(format!("{method} {path} ({name}) is not supported yet.")));
    }
    if body.is_empty() && (*method == Method::PUT || *method == Method::PATCH) {
        return Err(fault(format!("Empty {method} request.")));
    }
    match found {
        Some((Route { take: Take::Bare(action), .. }, _)) if query.is_none() && body.is_empty() => {
            Ok(action.clone().into())
        }
        Some((Route { take: Take::Body(take), .. }, id)) if query.is_none() => take(&Input { id, body }),
        Some((Route { take: Take::Named(take), .. }, Some(id))) if query.is_none() && body.is_empty() => {
            Ok(take(id)?.into())
        }
        Some((Route { take: Take::Query(take), .. }, _)) => Ok(take(query.unwrap_or_default())?.into()),
        _ => Err(fault(format!("Invalid request method and/or path: {method} {path}."))),
    }
}

impl Route {
    /// Whether this is the route of `method` and `path`, and the id in the path (`Some(None)`: it has none). A
    /// slash at the end makes no difference, as in Firecracker.
    fn matches<'a>(&self, method: &Method, path: &'a str) -> Option<Option<&'a str>> {
        if self.method != *method {
            return None;
        }
        let asked = path.strip_prefix('/')?;
        let ours = self.path.strip_prefix('/')?;
        let Some((parent, _)) = ours.split_once('{') else {
            return (asked.strip_suffix('/').unwrap_or(asked) == ours).then_some(None);
        };
        if asked == parent.trim_end_matches('/') {
            return Some(Some(""));
        }
        let id = asked.strip_prefix(parent)?;
        let id = id.strip_suffix('/').unwrap_or(id);
        (!id.contains('/')).then_some(Some(id))
    }
}

/// A request whose route is known.
struct Input<'a> {
    id: Option<&'a str>,
    body: &'a [u8],
}

impl Input<'_> {
    fn read<T: DeserializeOwned>(&self) -> Result<T, Fault> {
        // serde takes an array for a struct, too.
        if self.body.trim_ascii_start().starts_with(b"[") {
            return Err(unreadable("invalid type: array, expected an object"));
        }
        self.read_any()
    }

    /// The body, which may be any JSON.
    fn read_any<T: DeserializeOwned>(&self) -> Result<T, Fault> {
        resources::from_json(self.body).map_err(unreadable)
    }

    /// The body, whose id must be that of the path.
    fn read_named<T: DeserializeOwned>(&self, id: impl Fn(&T) -> &ResourceId) -> Result<T, Fault> {
        self.id.map_or(Ok(()), check_id)?;
        self.read_matching(|value| id(value).as_str())
    }

    fn read_matching<T: DeserializeOwned>(&self, id: impl Fn(&T) -> &str) -> Result<T, Fault> {
        let value = self.read()?;
        let (from_path, from_body) = (self.id.unwrap_or_default(), id(&value));
        if from_path != from_body {
            return Err(fault(format!(
                "The id from the path [{from_path}] does not match the id from the body [{from_body}]!"
            )));
        }
        Ok(value)
    }
}

fn fault(message: impl Into<String>) -> Fault {
    Fault::from(message.into())
}

fn unreadable(error: impl std::fmt::Display) -> Fault {
    fault(format!("An error occurred when deserializing the json body of a request: {error}."))
}

fn check_id(id: &str) -> Result<(), Fault> {
    if id.is_empty() {
        return Err(fault("The ID cannot be empty."));
    }
    if !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return Err(fault("API Resource IDs can only contain alphanumeric characters and underscores."));
    }
    Ok(())
}

/// `PUT /actions`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ActionBody {
    action_type: ActionType,
}

#[derive(Deserialize)]
enum ActionType {
    InstanceStart,
    FlushMetrics,
    SendCtrlAltDel,
}

fn put_action(input: &Input<'_>) -> Result<Request, Fault> {
    Ok(Request::from(match input.read::<ActionBody>()?.action_type {
        ActionType::InstanceStart => Action::Start,
        ActionType::FlushMetrics => Action::FlushMetrics,
        ActionType::SendCtrlAltDel => Action::SendCtrlAltDel,
    }))
}

/// `PATCH /vm`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VmStateBody {
    state: VmState,
}

fn put_container(input: &Input<'_>) -> Result<Request, Fault> {
    input.id.map_or(Ok(()), resources::check_container_id)?;
    let container = input.read_matching(|container: &Container| &container.id)?;
    Ok(Action::PutContainer(Box::new(container)).into())
}

fn delete_container(id: &str) -> Result<Action, Fault> {
    resources::check_container_id(id)?;
    Ok(Action::DeleteContainer(id.to_owned()))
}

fn patch_cgroup(input: &Input<'_>) -> Result<Request, Fault> {
    let patch: CgroupPatch = input.read()?;
    if patch == CgroupPatch::default() {
        return Err(fault("Empty PATCH request."));
    }
    Ok(Action::PatchCgroup(Box::new(patch)).into())
}

/// `since=N&timeout_ms=T`, both optional.
fn events_query(query: &str) -> Result<Action, Fault> {
    let mut asked = EventsQuery::default();
    for (key, value) in parameters(query, &["since", "timeout_ms"])? {
        *(if key == "since" { &mut asked.since } else { &mut asked.timeout_ms }) = whole(key, value)?;
    }
    if asked.timeout_ms > MAX_EVENTS_TIMEOUT_MS {
        return Err(fault(format!("the parameter timeout_ms can be {MAX_EVENTS_TIMEOUT_MS} at most")));
    }
    Ok(Action::GetCgroupEvents(asked))
}

/// `window_ms=T`, optional.
fn diagnosis_query(query: &str) -> Result<Action, Fault> {
    let mut asked = DiagnosisQuery { window_ms: DIAGNOSIS_MS };
    for (key, value) in parameters(query, &["window_ms"])? {
        asked.window_ms = window(whole(key, value)?)?;
    }
    Ok(Action::GetCgroupDiagnosis(asked))
}

/// `quota=Q|max&period=P&cpus=SET&window_ms=T`, all optional.
fn what_if_query(query: &str) -> Result<Action, Fault> {
    let mut asked = WhatIfQuery { bandwidth: None, cpus: None, window_ms: WHAT_IF_MS };
    let (mut quota, mut period) = (None, None);
    for (key, value) in parameters(query, &["quota", "period", "cpus", "window_ms"])? {
        match key {
            "quota" if value == "max" => quota = Some(None),
            "quota" => quota = Some(Some(whole(key, value)?)),
            "period" => period = Some(whole(key, value)?),
            "cpus" => {
                let cpus: CpuSet = value.parse().map_err(|error| parameter(key, &error))?;
                asked.cpus = Some(cpus).filter(|cpus| !cpus.is_empty());
            }
            _ => asked.window_ms = window(whole(key, value)?)?,
        }
    }
    asked.bandwidth = match (quota, period) {
        (None, None) => None,
        (None, Some(_)) => return Err(fault("the parameter period needs the parameter quota")),
        (Some(quota), period) => {
            let checked = Bandwidth::new(quota, period.unwrap_or(Bandwidth::default().period));
            Some(checked.map_err(|error| fault(error.to_string()))?)
        }
    };
    // Two periods at least: what is used in less says little.
    let least = asked.bandwidth.map_or(0, |bandwidth| (2 * bandwidth.period).div_ceil(1000));
    if asked.window_ms < least {
        return Err(fault(format!("the parameter window_ms must be {least} at least, for two periods")));
    }
    Ok(Action::GetCgroupWhatIf(Box::new(asked)))
}

/// The parameters of a query, whose names must be among these.
fn parameters<'a>(query: &'a str, names: &[&str]) -> Result<Vec<(&'a str, &'a str)>, Fault> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| match pair.split_once('=').unwrap_or((pair, "")) {
            (key, value) if names.contains(&key) => Ok((key, value)),
            (key, _) => {
                let names: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
                let names = names.join(" or ");
                Err(fault(format!("unknown parameter `{key}` in the query, expected {names}")))
            }
        })
        .collect()
}

fn whole(key: &str, value: &str) -> Result<u64, Fault> {
    value.parse().map_err(|_| fault(format!("the parameter {key} is `{value}`; it must be a whole number")))
}

fn parameter(key: &str, error: &dyn std::fmt::Display) -> Fault {
    fault(format!("the parameter {key}: {error}"))
}

fn window(ms: u64) -> Result<u64, Fault> {
    if WINDOWS_MS.contains(&ms) {
        return Ok(ms);
    }
    let (least, most) = (WINDOWS_MS.start(), WINDOWS_MS.end());
    Err(fault(format!("the parameter window_ms must be {least} to {most}")))
}

fn put_machine_config(input: &Input<'_>) -> Result<Request, Fault> {
    let config: MachineConfig = input.read()?;
    let deprecated = config.cpu_template.is_some();
    Ok(Request { action: Action::PutMachineConfig(config), deprecated })
}

fn patch_machine_config(input: &Input<'_>) -> Result<Request, Fault> {
    let patch: MachineConfigPatch = input.read()?;
    if patch == MachineConfigPatch::default() {
        return Err(fault("Empty PATCH request."));
    }
    let deprecated = patch.cpu_template.is_some();
    Ok(Request { action: Action::PatchMachineConfig(patch), deprecated })
}

fn put_vsock(input: &Input<'_>) -> Result<Request, Fault> {
    let vsock: Vsock = input.read()?;
    let deprecated = vsock.vsock_id.is_some();
    Ok(Request { action: Action::PutVsock(vsock), deprecated })
}

fn put_mmds_config(input: &Input<'_>) -> Result<Request, Fault> {
    let config: MmdsConfig = input.read()?;
    let deprecated = config.version == MmdsVersion::V1;
    Ok(Request { action: Action::PutMmdsConfig(config), deprecated })
}

#[cfg(test)]
#[path = "routes_tests.rs"]
mod tests;
