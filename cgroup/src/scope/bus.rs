//! systemd over D-Bus (org.freedesktop.systemd1(5)).

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;
use zbus::export::futures_core::Stream;
use zbus::message::Type;
use zbus::zvariant::{OwnedObjectPath, Type as Signature, Value};
use zbus::{Connection, MatchRule, Message, MessageStream, connection};

use super::{Manager, ScopeError, ScopeName, Started, Units};

/// How long systemd may take for one thing: runc's limit.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

const SYSTEMD: &str = "org.freedesktop.systemd1";
const OBJECT: &str = "/org/freedesktop/systemd1";
const INTERFACE: &str = "org.freedesktop.systemd1.Manager";
const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";

/// Ends of others' jobs that may arrive before the answer that names ours.
const JOBS: usize = 4096;

/// A runtime of tokio's that makes no threads, of which zbus then makes none either. Connections live within its
/// [`Runtime::enter`], to their end.
pub(super) fn runtime() -> Result<Runtime, ScopeError> {
    Builder::new_current_thread().enable_all().build().map_err(ScopeError::Setup)
}

/// A connection that lives on the calling thread alone.
pub(super) struct Bus<'r> {
    connection: Connection,
    jobs: MessageStream,
    runtime: &'r Runtime,
}

impl<'r> Bus<'r> {
    pub(super) fn connect(manager: Manager, runtime: &'r Runtime) -> Result<Self, ScopeError> {
        let connect = async {
            let builder = match manager {
                Manager::System => connection::Builder::system(),
                Manager::User => connection::Builder::session(),
            };
            let connection = builder?.build().await?;
            // From before the first job on.
            let ended = MatchRule::builder().msg_type(Type::Signal).path(OBJECT)?.interface(INTERFACE)?;
            let jobs =
                MessageStream::for_match_rule(ended.member("JobRemoved")?.build(), &connection, Some(JOBS));
            Ok((jobs.await?, connection))
        };
        match runtime.block_on(timeout(PATIENCE, connect)) {
            Ok(Ok((jobs, connection))) => Ok(Self { connection, jobs, runtime }),
            Ok(Err(error)) => Err(ScopeError::Unreachable(manager, Box::new(error))),
            Err(_) => {
                let late = zbus::Error::from(std::io::Error::from(std::io::ErrorKind::TimedOut));
                Err(ScopeError::Unreachable(manager, Box::new(late)))
            }
        }
    }

    /// Calls a method of the manager's. With `unless` the error of that name is no error but `None`.
    fn call<B: serde::Serialize + Signature>(
        &self,
        what: What<'_>,
        method: &str,
        body: &B,
        unless: &str,
    ) -> Result<Option<Message>, ScopeError> {
        let call = self.connection.call_method(Some(SYSTEMD), OBJECT, Some(INTERFACE), method, body);
        match self.wait(what, call)? {
            Ok(answer) => Ok(Some(answer)),
            Err(zbus::Error::MethodError(name, ..)) if name.as_str() == unless => Ok(None),
            Err(error) => Err(what.refused(error)),
        }
    }

    fn wait<T>(&self, what: What<'_>, future: impl Future<Output = T>) -> Result<T, ScopeError> {
        let outcome = self.runtime.block_on(timeout(PATIENCE, future));
        outcome.map_err(|_| ScopeError::Silent { doing: what.doing, unit: what.unit.to_owned() })
    }

    /// Waits for the end of the job that `answer` names.
    fn finish(&mut self, what: What<'_>, answer: &Message) -> Result<(), ScopeError> {
        let job: OwnedObjectPath = answer.body().deserialize().map_err(|error| what.refused(error))?;
        let systemd = answer.header().sender().map(ToString::to_string);
        let jobs = &mut self.jobs;
        let ended = async {
            loop {
                let Some(signal) = poll_fn(|context| Pin::new(&mut *jobs).poll_next(context)).await else {
                    return Err(zbus::Error::from(std::io::Error::from(std::io::ErrorKind::UnexpectedEof)));
                };
                let signal = signal?;
                if signal.header().sender().map(ToString::to_string) != systemd {
                    continue;
                }
                let (_, path, _, result): (u32, OwnedObjectPath, String, String) =
                    signal.body().deserialize()?;
                if path == job {
                    return Ok(result);
                }
            }
        };
        let outcome = self.runtime.block_on(timeout(PATIENCE, ended));
        let (doing, unit) = (what.doing, what.unit.to_owned());
        match outcome {
            Ok(Ok(result)) if result == "done" => Ok(()),
            Ok(Ok(result)) => Err(ScopeError::Job { doing, unit, result }),
            Ok(Err(error)) => Err(what.refused(error)),
            Err(_) => Err(ScopeError::Silent { doing, unit }),
        }
    }
}

/// What is being done to which unit, for errors.
#[derive(Clone, Copy)]
struct What<'a> {
    doing: &'static str,
    unit: &'a str,
}

impl What<'_> {
    fn refused(self, error: zbus::Error) -> ScopeError {
        ScopeError::Refused { doing: self.doing, unit: self.unit.to_owned(), source: Box::new(error) }
    }
}

impl Units for Bus<'_> {
    fn start(&mut self, name: &ScopeName) -> Result<Started, ScopeError> {
        let what = What { doing: "start", unit: name.unit() };
        // Those of runc; a scope that fails is forgotten by systemd, too.
        let properties: Vec<(&str, Value<'_>)> = vec![
            ("Description", Value::from("Pinfold microVM")),
            ("Slice", Value::from(name.slice())),
            ("PIDs", Value::from(vec![std::process::id()])),
            ("Delegate", Value::from(true)),
            ("DefaultDependencies", Value::from(false)),
            ("CPUAccounting", Value::from(true)),
            ("MemoryAccounting", Value::from(true)),
            ("IOAccounting", Value::from(true)),
            ("TasksAccounting", Value::from(true)),
            ("CollectMode", Value::from("inactive-or-failed")),
        ];
        let others: Vec<(&str, Vec<(&str, Value<'_>)>)> = Vec::new();
        let body = (name.unit(), "fail", properties, others);
        match self.call(what, "StartTransientUnit", &body, UNIT_EXISTS)? {
            None => Ok(Started::Exists),
            Some(answer) => self.finish(what, &answer).map(|()| Started::Done),
        }
    }

    fn populated(&mut self, unit: &str) -> Result<bool, ScopeError> {
        let what = What { doing: "list the processes of", unit };
        let Some(answer) = self.call(what, "GetUnitProcesses", &unit, NO_SUCH_UNIT)? else {
            return Ok(false);
        };
        let processes: Vec<(String, u32, String)> =
            answer.body().deserialize().map_err(|error| what.refused(error))?;
        Ok(!processes.is_empty())
    }

    fn reset_failed(&mut self, unit: &str) -> Result<(), ScopeError> {
        self.call(What { doing: "reset", unit }, "ResetFailedUnit", &unit, NO_SUCH_UNIT).map(drop)
    }

    fn stop(&mut self, unit: &str) -> Result<(), ScopeError> {
        let what = What { doing: "stop", unit };
        match self.call(what, "StopUnit", &(unit, "replace"), NO_SUCH_UNIT)? {
            None => Ok(()),
            Some(answer) => self.finish(what, &answer),
        }
    }
}
