//! Writes the man pages and shell completions that packages bring, from the command line's own description:
//! `manual DIR`. No part of the agent, so that no gateway carries it, and a program for another CPU needs not run for it.

use clap::CommandFactory;
use clap_complete::Shell;
use millwright::commands::Cli;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

/// What the command line can't know of a gateway that was set up from a package.
const FILES: &str = r".SH FILES
.TP
/etc/millwright/agent.toml
The configuration. Without it the service does not start.
.TP
/usr/share/doc/millwright/examples/agent.toml
Every key of the configuration with its meaning.
.TP
/etc/millwright/tls/, /etc/millwright/credentials/
Certificates; keys and passwords, for root alone.
.TP
/var/lib/millwright/
The journal of tasks, what was computed from the model, and the models.
.SH ENVIRONMENT
.TP
MILLWRIGHT_LOG
How much is logged: error, warn, info, debug or trace, for libraries by name (debug,rustls=debug).
";

fn main() -> io::Result<()> {
    let dir = env::args_os().nth(1).map(PathBuf::from);
    let dir = dir.ok_or_else(|| io::Error::other("which folder? `manual DIR`"))?;
    pages(&dir.join("man1"))?;
    completions(&dir.join("completions"))
}

/// One page for each command, as git does.
fn pages(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    clap_mangen::generate_to(Cli::command(), dir)?;
    let main = dir.join("millwright.1");
    let page = fs::read_to_string(&main)?;
    fs::write(main, page + FILES)
}

fn completions(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Cli::command(), "millwright", dir)?;
    }
    Ok(())
}
