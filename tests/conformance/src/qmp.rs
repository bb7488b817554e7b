//! QEMU's machine protocol, as far as migrations need it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// A connection to the monitor of a QEMU.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    socket: PathBuf,
}

/// How a migration ended.
#[derive(Clone, Debug)]
pub struct Migrated {
    /// `completed`, `cancelled` or `failed`.
    pub status: String,
    /// Milliseconds that the guest stood still.
    pub downtime_ms: u64,
    /// Milliseconds of the whole.
    pub total_ms: u64,
    /// What QEMU says went wrong.
    pub error: String,
}

impl Qmp {
    /// The arguments that make a QEMU listen for [`Qmp::connect`].
    #[must_use]
    pub fn arguments(socket: &Path) -> [String; 2] {
        ["-qmp".to_owned(), format!("unix:{},server=on,wait=off", socket.display())]
    }

    /// Connects, and again until the socket is there.
    ///
    /// # Errors
    /// It does not come, or nobody greets.
    pub fn connect(socket: &Path) -> Result<Self> {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if start.elapsed() > CONNECT_TIMEOUT => {
                    bail!("no monitor at {}: {error}", socket.display())
                }
                Err(_) => std::thread::sleep(POLL),
            }
        };
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let mut qmp = Self { reader: BufReader::new(stream), socket: socket.to_owned() };
        let _ = qmp.line()?;
        let _ = qmp.ask("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let read = self.reader.read_line(&mut line);
        let read = read.with_context(|| format!("no answer from {}", self.socket.display()))?;
        ensure!(read > 0, "the QEMU at {} is gone", self.socket.display());
        serde_json::from_str(&line).with_context(|| format!("QEMU says: {line}"))
    }

    /// Runs a command and returns what it answers.
    ///
    /// # Errors
    /// QEMU refuses it, or does not answer.
    pub fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let message = json!({"execute": command, "arguments": arguments});
        writeln!(self.reader.get_mut(), "{message}")?;
        loop {
            let answer = self.line()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            // Anything else is an event.
        }
    }

    /// Begins to migrate to a QEMU that was started with `-incoming URI`.
    ///
    /// # Errors
    /// QEMU refuses.
    pub fn migrate(&mut self, uri: &str) -> Result<()> {
        self.ask("migrate", &json!({"uri": uri})).map(drop)
    }

    /// Sets the bounds of a migration.
    ///
    /// # Errors
    /// QEMU refuses.
    pub fn set_migration(&mut self, downtime_ms: u64, bytes_per_second: u64) -> Result<()> {
        let bounds = json!({"downtime-limit": downtime_ms, "max-bandwidth": bytes_per_second});
        self.ask("migrate-set-parameters", &bounds).map(drop)
    }

    /// The state of the migration.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub fn migration(&mut self) -> Result<Migrated> {
        let info = self.ask("query-migrate", &json!({}))?;
        let number = |name: &str| info.get(name).and_then(Value::as_u64).unwrap_or(0);
        let text =
            |name: &str| info.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        Ok(Migrated {
            status: text("status"),
            downtime_ms: number("downtime"),
            total_ms: number("total-time"),
            error: text("error-desc"),
        })
    }

    /// Waits until the migration has one of these states.
    ///
    /// # Errors
    /// It ends in another one, or takes too long.
    pub fn wait_migration(&mut self, wanted: &[&str], timeout: Duration) -> Result<Migrated> {
        let start = Instant::now();
        loop {
            let now = self.migration()?;
            if wanted.contains(&now.status.as_str()) {
                return Ok(now);
            }
            let over = ["completed", "cancelled", "failed"].contains(&now.status.as_str());
            ensure!(!over, "the migration is {}: {}", now.status, now.error);
            ensure!(start.elapsed() < timeout, "the migration stays {}", now.status);
            std::thread::sleep(POLL);
        }
    }
}
