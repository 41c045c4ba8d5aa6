//! The journal's file: redb's tables and one transaction per batch of changes. Knows rows, not what they are for; no
//! thread, no clock.

use super::record::{NoteRow, SaidRow, Stamp, TaskRow, Unreadable, decode, encode};
use super::{Change, Past};
use millwright_task::job::Ticket;
use millwright_task::limits::JOURNAL_CACHE_BYTES;
use millwright_task::wire::Key;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, Table, TableDefinition};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Accepted and not final, by ticket.
const TASKS: TableDefinition<u64, &[u8]> = TableDefinition::new("tasks");
/// What happened to them since; apart, so that a task of 256 KiB isn't written anew for a flag.
const NOTES: TableDefinition<u64, &[u8]> = TableDefinition::new("notes");
/// Said once, by ticket: remembered final events, and whatever is not delivered.
const SAID: TableDefinition<u64, &[u8]> = TableDefinition::new("said");
/// Of those, what the broker has not acknowledged.
const UNSENT: TableDefinition<u64, ()> = TableDefinition::new("unsent");
/// Cancels that came before their task, with the time of each in milliseconds.
const CANCELS: TableDefinition<(&str, &str), u64> = TableDefinition::new("cancels");
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const FORMAT: &str = "format";
const TIME: &str = "time";
const LAST: &str = "last";

/// The tables' arrangement.
const FORMAT_VERSION: u32 = 1;
/// No version: the tables are of another program.
const FOREIGN: u32 = 0;

/// Why the file can't be used.
#[derive(Debug)]
pub(super) enum OpenError {
    /// Another process has it.
    Taken,
    /// It is damaged, or not ours; it may be set aside.
    Unusable(String),
    /// The disk.
    Disk(std::io::Error),
}

/// The open file.
pub(super) struct Store {
    path: PathBuf,
    /// `None` after an error: redb wants to be opened anew then.
    database: Option<Database>,
}

impl Store {
    /// Opens the file, or makes it, and reads all there is.
    pub(super) fn open(path: &Path) -> Result<(Self, Past), OpenError> {
        // Some damage makes redb panic.
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let database = database(path)?;
            let past = read(&database)?;
            Ok((database, past))
        }));
        let unusable = || OpenError::Unusable("it can't be read at all".into());
        let (database, past) = opened.unwrap_or_else(|_| Err(unusable()))?;
        let store = Self {
            path: path.to_owned(),
            database: Some(database),
        };
        Ok((store, past))
    }

    /// Writes all of `changes` or none; when it returns, they are on disk.
    pub(super) fn write(&mut self, changes: &[Change], stamp: &Stamp) -> Result<(), redb::Error> {
        let database = match self.database.take() {
            Some(database) => database,
            None => builder().open(&self.path)?,
        };
        write(&database, changes, stamp)?;
        self.database = Some(database);
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn pretend_version(&self, version: u32) {
        let transaction = self.database.as_ref().unwrap().begin_write().unwrap();
        let mut meta = transaction.open_table(META).unwrap();
        meta.insert(FORMAT, version.to_le_bytes().as_slice())
            .unwrap();
        drop(meta);
        transaction.commit().unwrap();
    }
}

fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    // Its default is a gibibyte.
    builder.set_cache_size(JOURNAL_CACHE_BYTES);
    builder
}

fn database(path: &Path) -> Result<Database, OpenError> {
    // It holds prompts and answers: nobody else's to read.
    let made = File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path);
    made.map_err(OpenError::Disk)?;
    let mut builder = builder();
    // The file is small, and a start rare: damage is found here, not on the way.
    builder.set_check_integrity_on_open(true);
    Ok(builder.create(path)?)
}

impl From<Unreadable> for OpenError {
    fn from(e: Unreadable) -> Self {
        Self::Unusable(format!("a row can't be read: {}", e.0))
    }
}

impl From<DatabaseError> for OpenError {
    fn from(e: DatabaseError) -> Self {
        match e {
            DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => Self::Taken,
            other => redb::Error::from(other).into(),
        }
    }
}

impl From<redb::Error> for OpenError {
    /// Only what is certain to be the file's fault is that: it costs all that the file holds.
    fn from(e: redb::Error) -> Self {
        use redb::Error;
        match e {
            Error::Io(e) => match e.kind() {
                ErrorKind::InvalidData | ErrorKind::UnexpectedEof => Self::Unusable(e.to_string()),
                _ => Self::Disk(e),
            },
            Error::Corrupted(_)
            | Error::UpgradeRequired(_)
            | Error::TableTypeMismatch { .. }
            | Error::TypeDefinitionChanged { .. }
            | Error::TableIsMultimap(_)
            | Error::TableDoesNotExist(_) => Self::Unusable(e.to_string()),
            other => Self::Disk(std::io::Error::other(other)),
        }
    }
}

/// Makes the tables where they are missing, and reads them.
fn read(database: &Database) -> Result<Past, OpenError> {
    let version = version(database).map_err(OpenError::from)?;
    if version == FOREIGN {
        return Err(OpenError::Unusable("another program made it".into()));
    }
    if version != FORMAT_VERSION {
        let reason = format!("its format is {version}, and this program knows {FORMAT_VERSION}");
        return Err(OpenError::Unusable(reason));
    }
    let rows = rows(database)?;
    let mut past = Past {
        stamp: rows.stamp,
        last: Ticket(rows.last),
        cancels: rows.cancels,
        ..Past::default()
    };
    let notes: HashMap<_, _> = rows.notes.into_iter().collect();
    for (ticket, bytes) in rows.tasks {
        let row: TaskRow = decode(&bytes)?;
        let note = notes.get(&ticket);
        let note: NoteRow = note.map_or(Ok(NoteRow::default()), |bytes| decode(bytes))?;
        past.open.push(row.kept(Ticket(ticket), note));
    }
    let mut unsent = Vec::new();
    for (ticket, bytes) in rows.said {
        let row: SaidRow = decode(&bytes)?;
        past.finals.extend(row.recalled(Ticket(ticket))?);
        if rows.unsent.contains(&ticket) {
            let at = row.at_ms();
            unsent.extend(row.post(Ticket(ticket))?.map(|post| (at, post)));
        }
    }
    unsent.sort_by_key(|(at, post)| (*at, post.ticket));
    past.unsent = unsent.into_iter().map(|(_, post)| post).collect();
    // As the dedup window wants them: the oldest first, and those without their text are that.
    past.finals
        .sort_by_key(|(_, r)| (r.bytes.is_some(), r.at, r.ticket));
    past.cancels.sort();
    Ok(past)
}

/// The file's format; a new file gets ours.
fn version(database: &Database) -> Result<u32, redb::Error> {
    let transaction = database.begin_write()?;
    let known = {
        let is_empty = transaction.list_tables()?.next().is_none()
            && transaction.list_multimap_tables()?.next().is_none();
        let mut meta = transaction.open_table(META)?;
        let known = meta.get(FORMAT)?.map(|v| v.value().to_vec());
        let version = known.map(|bytes| bytes.try_into().map_or(FOREIGN, u32::from_le_bytes));
        let version = version.or((!is_empty).then_some(FOREIGN));
        if version.is_none() {
            meta.insert(FORMAT, FORMAT_VERSION.to_le_bytes().as_slice())?;
            transaction.open_table(TASKS)?;
            transaction.open_table(NOTES)?;
            transaction.open_table(SAID)?;
            transaction.open_table(UNSENT)?;
            transaction.open_table(CANCELS)?;
        }
        version
    };
    // A start of an old file writes nothing.
    match known {
        Some(_) => transaction.abort()?,
        None => transaction.commit()?,
    }
    Ok(known.unwrap_or(FORMAT_VERSION))
}

#[derive(Default)]
struct Rows {
    tasks: Vec<(u64, Vec<u8>)>,
    notes: Vec<(u64, Vec<u8>)>,
    said: Vec<(u64, Vec<u8>)>,
    unsent: HashSet<u64>,
    cancels: Vec<(Duration, Key)>,
    stamp: Option<Stamp>,
    last: u64,
}

fn rows(database: &Database) -> Result<Rows, OpenError> {
    let load = || -> Result<(Rows, Option<Vec<u8>>), redb::Error> {
        let transaction = database.begin_read()?;
        let all = |table: TableDefinition<'_, u64, &'static [u8]>| {
            let table = transaction.open_table(table)?;
            let mut rows = Vec::new();
            for row in table.iter()? {
                let (ticket, bytes) = row?;
                rows.push((ticket.value(), bytes.value().to_vec()));
            }
            Ok::<_, redb::Error>(rows)
        };
        let mut rows = Rows {
            tasks: all(TASKS)?,
            notes: all(NOTES)?,
            said: all(SAID)?,
            ..Rows::default()
        };
        for row in transaction.open_table(UNSENT)?.iter()? {
            rows.unsent.insert(row?.0.value());
        }
        for row in transaction.open_table(CANCELS)?.iter()? {
            let (key, at) = row?;
            let (sender, task) = key.value();
            let key = Key {
                sender: sender.to_owned(),
                task: task.to_owned(),
            };
            rows.cancels.push((Duration::from_millis(at.value()), key));
        }
        let meta = transaction.open_table(META)?;
        let number = meta.get(LAST)?.and_then(|v| v.value().try_into().ok());
        rows.last = number.map_or(0, u64::from_le_bytes);
        let stamp = meta.get(TIME)?.map(|v| v.value().to_vec());
        Ok((rows, stamp))
    };
    let (mut rows, stamp) = load()?;
    rows.stamp = stamp.map(|bytes| decode(&bytes)).transpose()?;
    Ok(rows)
}

fn write(database: &Database, changes: &[Change], stamp: &Stamp) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut tasks = transaction.open_table(TASKS)?;
        let mut notes = transaction.open_table(NOTES)?;
        let mut said = transaction.open_table(SAID)?;
        let mut unsent = transaction.open_table(UNSENT)?;
        let mut cancels = transaction.open_table(CANCELS)?;
        let mut meta = transaction.open_table(META)?;
        let mut last = None;
        for change in changes {
            match change {
                Change::Accepted { ticket, task, seed } => {
                    tasks.insert(ticket.0, encode(&TaskRow::new(task, *seed)).as_slice())?;
                    last = last.max(Some(ticket.0));
                }
                Change::Moved { ticket, reply } => {
                    note(&mut notes, *ticket, |row| row.move_to(reply))?;
                }
                Change::Begun { ticket, times } => {
                    note(&mut notes, *ticket, |row| row.begun = *times)?;
                }
                Change::Cancelled(ticket) => note(&mut notes, *ticket, |row| row.cancelled = true)?,
                Change::Said { post, at } => {
                    let row = SaidRow::new(post, *at);
                    said.insert(post.ticket.0, encode(&row).as_slice())?;
                    unsent.insert(post.ticket.0, ())?;
                    last = last.max(Some(post.ticket.0));
                }
                Change::Ended(ticket) => {
                    tasks.remove(ticket.0)?;
                    notes.remove(ticket.0)?;
                }
                Change::Delivered(ticket) => {
                    unsent.remove(ticket.0)?;
                    if known(&said, *ticket)?.is_some_and(|row| !row.is_remembered()) {
                        said.remove(ticket.0)?;
                    }
                }
                // What is not delivered stays whole, whatever the dedup window's bounds.
                Change::Stripped(ticket) if unsent.get(ticket.0)?.is_none() => {
                    if let Some(mut row) = known(&said, *ticket)? {
                        row.strip();
                        said.insert(ticket.0, encode(&row).as_slice())?;
                    }
                }
                Change::Stripped(_) => {}
                Change::Forgotten(ticket) if unsent.get(ticket.0)?.is_none() => {
                    said.remove(ticket.0)?;
                }
                Change::Forgotten(ticket) => {
                    if let Some(mut row) = known(&said, *ticket)? {
                        row.forget();
                        said.insert(ticket.0, encode(&row).as_slice())?;
                    }
                }
                Change::CancelKept { key, at } => {
                    let at = at.as_millis() as u64;
                    cancels.insert((key.sender.as_str(), key.task.as_str()), at)?;
                }
                Change::CancelGone(key) => {
                    cancels.remove((key.sender.as_str(), key.task.as_str()))?;
                }
            }
        }
        let stored = meta.get(LAST)?.and_then(|v| v.value().try_into().ok());
        let stored = stored.map(u64::from_le_bytes);
        if let Some(last) = last.filter(|last| Some(*last) > stored) {
            meta.insert(LAST, last.to_le_bytes().as_slice())?;
        }
        meta.insert(TIME, encode(stamp).as_slice())?;
    }
    transaction.commit()?;
    Ok(())
}

type Bytes<'t> = Table<'t, u64, &'static [u8]>;

/// Changes what is noted of a task.
fn note(
    notes: &mut Bytes<'_>,
    ticket: Ticket,
    change: impl FnOnce(&mut NoteRow),
) -> Result<(), redb::Error> {
    let row = notes.get(ticket.0)?.map(|row| decode(row.value()));
    // It was read when the file was opened, or written since.
    let mut row = row.and_then(Result::ok).unwrap_or_default();
    change(&mut row);
    notes.insert(ticket.0, encode(&row).as_slice())?;
    Ok(())
}

fn known(said: &Bytes<'_>, ticket: Ticket) -> Result<Option<SaidRow>, redb::Error> {
    let row = said.get(ticket.0)?.map(|row| decode(row.value()));
    Ok(row.and_then(Result::ok))
}
