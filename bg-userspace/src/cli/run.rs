use std::io::IsTerminal as _;

use clap::Args;
use tracing_subscriber::EnvFilter;

use super::Common;
use crate::daemon::Daemon;

const NOTE: &str = "\
Logs go to stderr; RUST_LOG sets what is logged. SIGTERM and SIGINT stop the
daemon, forwarding goes on; SIGHUP reloads. Tells systemd when it is ready
(Type=notify or notify-reload).

  bgswitch run --config /etc/bgswitch/bgswitch.toml";

/// `bgswitch run`.
#[derive(Debug, Args)]
#[command(after_help = NOTE)]
pub(super) struct Run {}

pub(super) fn run(common: &Common) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new("info,aya=warn,aya_obj=warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let daemon = Daemon::start(&common.config)?;
    runtime.block_on(daemon.run())
}
