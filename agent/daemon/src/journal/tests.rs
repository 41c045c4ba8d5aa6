use super::*;
use millwright_task::job::Class;
use millwright_task::wire::{Format, Kind, Message, Sampling};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;

fn stamp() -> Stamp {
    Stamp {
        boot_id: "b".into(),
        boot_ms: 1,
        own_ms: 2,
        wall_ms: 3,
        synced: true,
    }
}

fn reply(topic: &str) -> Reply {
    Reply {
        topic: topic.into(),
        correlation: Some(vec![1, 2]),
        format: Format::Json,
    }
}

fn key(id: &str) -> Key {
    Key {
        sender: "mes".into(),
        task: id.into(),
    }
}

fn task(id: &str) -> Task {
    Task {
        key: key(id),
        kind: Kind::Chat {
            messages: vec![Message {
                role: "user".into(),
                content: "what does the pump do?".into(),
            }],
        },
        max_tokens: 8,
        stop: vec!["\n".into()],
        sampling: Sampling {
            temperature: 0.5,
            top_k: 4,
            top_p: 0.9,
            min_p: 0.1,
            repeat_penalty: 1.5,
            seed: None,
        },
        priority: 5,
        stream: true,
        deadline: Duration::from_mins(1),
        reply: reply(id),
        digest: [7; 32],
        bytes: 100,
    }
}

fn post(ticket: u64, id: &str, remembered: bool) -> Post {
    Post {
        ticket: Ticket(ticket),
        key: key(id),
        reply: reply(id),
        event: if remembered { "done" } else { "rejected" },
        class: Class::Final,
        bytes: format!("the answer to {id}").into_bytes(),
        remembered: remembered.then_some([7; 32]),
    }
}

/// The same, said in the compact form.
fn compact(mut post: Post) -> Post {
    post.reply.format = Format::Postcard;
    post
}

fn accepted(ticket: u64, id: &str) -> Change {
    Change::Accepted {
        ticket: Ticket(ticket),
        task: Box::new(task(id)),
        seed: 42,
    }
}

fn said(ticket: u64, id: &str, remembered: bool) -> Change {
    Change::Said {
        post: post(ticket, id, remembered),
        at: Duration::from_millis(ticket),
    }
}

/// What is read after these batches were written.
fn after(batches: &[&[Change]]) -> Past {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    let (mut store, _) = Store::open(&path).unwrap();
    for changes in batches {
        store.write(changes, &stamp()).unwrap();
    }
    drop(store);
    Store::open(&path).unwrap().1
}

fn unsent(past: &Past) -> Vec<u64> {
    past.unsent.iter().map(|post| post.ticket.0).collect()
}

#[test]
fn an_accepted_task_comes_back_as_it_was() {
    let moved = Change::Moved {
        ticket: Ticket(3),
        reply: reply("elsewhere"),
    };
    let begun = |times| Change::Begun {
        ticket: Ticket(3),
        times,
    };
    let noted = [begun(1), moved, begun(2), Change::Cancelled(Ticket(3))];
    let past = after(&[&[accepted(3, "a"), accepted(4, "b")], &noted]);
    let moved = Task {
        reply: reply("elsewhere"),
        ..task("a")
    };
    let kept = |ticket, task, begun, cancelled| Kept {
        ticket: Ticket(ticket),
        task,
        begun,
        cancelled,
    };
    let expected = [
        (kept(3, moved, 2, true), 42),
        (kept(4, task("b"), 0, false), 42),
    ];
    assert_eq!(past.open, expected);
    assert_eq!((past.last, past.stamp), (Ticket(4), Some(stamp())));
}

#[test]
fn an_answer_is_kept_until_it_is_delivered_and_remembered_beyond() {
    let ended = [Change::Ended(Ticket(1)), said(1, "a", true)];
    let past = after(&[&[accepted(1, "a")], &ended]);
    assert!(past.open.is_empty());
    assert_eq!(past.unsent, [post(1, "a", true)]);
    assert_eq!(past.finals[0].0, key("a"));
    assert_eq!(past.finals[0].1.at, Duration::from_millis(1));

    let past = after(&[&ended, &[Change::Delivered(Ticket(1))]]);
    assert_eq!((unsent(&past), past.finals.len()), (vec![], 1));

    // A refusal is not remembered.
    let refused = [said(2, "b", false)];
    let past = after(&[&refused]);
    assert_eq!((unsent(&past), past.finals.len()), (vec![2], 0));
    let past = after(&[&refused, &[Change::Delivered(Ticket(2))]]);
    assert_eq!((unsent(&past), past.last), (vec![], Ticket(2)));
}

#[test]
fn bytes_come_back_with_the_form_they_are_in() {
    let all = ["json", "compact"].map(|id| post(1 + id.len() as u64, id, true));
    let [json, compact] = [all[0].clone(), compact(all[1].clone())];
    let said = |post: &Post| Change::Said {
        post: post.clone(),
        at: Duration::ZERO,
    };
    let past = after(&[&[said(&json), said(&compact)]]);
    let formats: Vec<_> = past.finals.iter().map(|(_, r)| r.format).collect();
    assert_eq!(formats, [Format::Json, Format::Postcard]);
    assert_eq!(past.unsent, [json, compact]);
}

#[test]
fn tickets_never_go_back_and_what_was_said_first_is_sent_first() {
    let past = after(&[
        &[said(6, "refused", false)],
        &[Change::Said {
            post: post(5, "a", true),
            at: Duration::from_millis(7),
        }],
    ]);
    assert_eq!((past.last, unsent(&past)), (Ticket(6), vec![6, 5]));
}

#[test]
fn a_disk_that_hangs_is_no_bottomless_memory() {
    let folder = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(folder.path()).unwrap().0;
    let large = Task {
        bytes: 256 << 10,
        ..task("a")
    };
    let mut count = 0;
    while journal.has_room() {
        count += 1;
        journal.note(Change::Accepted {
            ticket: Ticket(count),
            task: Box::new(large.clone()),
            seed: 0,
        });
        journal.flush(stamp, false);
    }
    assert!((12..20).contains(&count), "{count}");
}

#[test]
fn bounds_of_the_window_take_nothing_that_is_not_delivered() {
    let all = [said(1, "a", true), said(2, "b", true), said(3, "c", true)];
    let delivered = [Change::Delivered(Ticket(1)), Change::Delivered(Ticket(2))];
    let bounded = [
        Change::Stripped(Ticket(1)),
        Change::Forgotten(Ticket(2)),
        Change::Stripped(Ticket(3)),
        Change::Forgotten(Ticket(3)),
    ];
    let past = after(&[&all, &delivered, &bounded]);
    assert_eq!(
        past.unsent,
        [Post {
            remembered: None,
            ..post(3, "c", true)
        }]
    );
    let [(of, recalled)] = past.finals.as_slice() else {
        panic!("{:?}", past.finals);
    };
    let text = (recalled.bytes.clone(), recalled.bytes_len);
    assert_eq!((of, text), (&key("a"), (None, "the answer to a".len())));
}

#[test]
fn cancels_come_back_the_oldest_first() {
    let kept = |id: &str, ms| Change::CancelKept {
        key: key(id),
        at: Duration::from_millis(ms),
    };
    let gone = [Change::CancelGone(key("b"))];
    let past = after(&[&[kept("a", 9), kept("b", 7), kept("c", 5)], &gone]);
    let ids: Vec<_> = past.cancels.iter().map(|(_, key)| &key.task).collect();
    assert_eq!(ids, ["c", "a"]);
}

#[test]
fn a_batch_is_written_whole_and_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let (mut journal, past, mut written) = Journal::open(folder.path()).unwrap();
    assert!(past.open.is_empty() && journal.is_settled());
    // What nobody waits for stays, until something comes that somebody does.
    journal.note(Change::Delivered(Ticket(9)));
    journal.flush(stamp, false);
    assert!(!journal.is_settled() && journal.mark() <= journal.kept());
    journal.note(accepted(1, "a"));
    let mark = journal.mark();
    assert!(mark > journal.kept());
    journal.flush(stamp, false);
    // What comes while the thread writes or pauses is gathered: what was handed over, and what can't be yet.
    for ticket in 2..500 {
        journal.note(accepted(ticket, "b"));
        journal.flush(stamp, false);
        journal.note(Change::Ended(Ticket(ticket - 1)));
    }
    let mut writes = 0;
    while !journal.is_settled() {
        let Some(Written::Kept { mark, bytes }) = written.blocking_recv() else {
            panic!("the disk has no trouble");
        };
        assert!(mark > journal.kept());
        journal.keep(mark, bytes);
        journal.flush(stamp, false);
        writes += 1;
    }
    // Four whose news nobody took, the one that then waited, and the rest in a few parts.
    assert!(writes <= 8, "{writes}");
    assert_eq!(journal.unkept_bytes, 0);
    // Nobody need listen.
    drop(written);
    for ticket in 500..520 {
        journal.note(accepted(ticket, "c"));
        journal.flush(stamp, false);
    }
    drop(journal);
    let open = Journal::open(folder.path()).unwrap().1.open;
    let tickets: Vec<_> = open.iter().map(|(kept, _)| kept.ticket.0).collect();
    assert_eq!(tickets, (499..520).collect::<Vec<_>>());
}

#[test]
fn no_second_has_more_writes_than_flash_is_to_take() {
    let began = Instant::now();
    let mut pace = Pace::begin(began);
    let (mut now, mut writes) = (began, Vec::new());
    // One after the other as fast as may be, with pauses now and then after which several may follow at once.
    for n in 0..5_000u64 {
        let next = pace.take(now);
        writes.push(now);
        now = now.max(next);
        if n % 997 == 0 {
            now += Duration::from_millis(n % 400);
        }
    }
    let within = |from: usize| {
        let end = writes[from] + Duration::from_secs(1);
        writes[from..].iter().take_while(|at| **at < end).count()
    };
    let most = (0..writes.len()).map(within).max();
    assert_eq!(most, Some(WRITES_MAX as usize));
}

#[test]
fn what_is_no_journal_is_set_aside_with_a_name() {
    let names = |folder: &Path| {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    fs::write(&path, "something else entirely").unwrap();
    let past = Journal::open(folder.path()).unwrap().1;
    assert!(past.open.is_empty());
    assert_eq!(names(folder.path()), [FILE, "journal.unusable-1"]);

    // One of a later version.
    let (store, _) = Store::open(&path).unwrap();
    store.pretend_version(99);
    drop(store);
    Journal::open(folder.path()).unwrap();
    assert_eq!(names(folder.path()).len(), 3);

    // Another program's database.
    fs::remove_file(&path).unwrap();
    let other = redb::Database::create(&path).unwrap();
    let transaction = other.begin_write().unwrap();
    let table = redb::TableDefinition::<u64, u64>::new("theirs");
    transaction.open_table(table).unwrap().insert(1, 2).unwrap();
    transaction.commit().unwrap();
    drop(other);
    let Err(OpenError::Unusable(why)) = Store::open(&path) else {
        panic!("it is another program's");
    };
    assert!(why.contains("another program"), "{why}");
    Journal::open(folder.path()).unwrap();
    assert_eq!(names(folder.path()).len(), 4);

    // Damage wherever it is: set aside or all as it was, never a panic and never a part.
    let (mut whole, mut aside) = (0, 0);
    for seed in 1..61u64 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        let (mut store, _) = Store::open(&path).unwrap();
        for ticket in 1..20 {
            let changes = [accepted(ticket, "a"), said(100 + ticket, "b", true)];
            store.write(&changes, &stamp()).unwrap();
        }
        drop(store);
        let before = format!("{:?}", Store::open(&path).unwrap().1);
        let mut file = fs::File::options().write(true).open(&path).unwrap();
        let len = file.metadata().unwrap().len();
        let at = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) % len;
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(&[0xA5; 64]).unwrap();
        if seed % 3 == 0 {
            file.set_len(at).unwrap();
        }
        drop(file);
        let past = Journal::open(folder.path()).unwrap().1;
        if names(folder.path()).len() == 1 {
            assert_eq!(format!("{past:?}"), before, "seed {seed}");
            whole += 1;
        } else {
            let nothing = Past::default();
            assert_eq!(format!("{past:?}"), format!("{nothing:?}"), "seed {seed}");
            aside += 1;
        }
    }
    assert!(
        whole > 5 && aside > 5,
        "{whole} were whole, {aside} set aside"
    );
}

#[test]
fn nobody_else_reads_what_it_holds() {
    let folder = tempfile::tempdir().unwrap();
    let _journal = Journal::open(folder.path()).unwrap();
    let mode = fs::metadata(folder.path().join(FILE))
        .unwrap()
        .permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
}

#[test]
fn two_agents_do_not_share_a_journal() {
    let folder = tempfile::tempdir().unwrap();
    let _first = Journal::open(folder.path()).unwrap();
    let second = Journal::open(folder.path()).map(drop).unwrap_err();
    assert!(second.to_string().contains("another process"), "{second}");
}

/// What a later program must read: a file of version 1, its pages as a line for each 32 bytes that aren't zero.
#[test]
fn a_journal_of_version_1_is_read() {
    let begun = Change::Begun {
        ticket: Ticket(2),
        times: 1,
    };
    let cancel = Change::CancelKept {
        key: key("e"),
        at: Duration::from_millis(5),
    };
    let first = [accepted(1, "a"), accepted(2, "b"), begun, cancel];
    let second = [said(3, "c", true), said(4, "d", false)];
    let third = [Change::Ended(Ticket(1)), Change::Delivered(Ticket(3))];
    let expected = after(&[&first, &second, &third]);

    let mut lines = include_str!("frozen/journal").lines();
    let mut bytes = vec![0; lines.next().unwrap().parse().unwrap()];
    for line in lines {
        let (at, digits) = line.split_once(' ').unwrap();
        let at: usize = at.parse().unwrap();
        for n in 0..digits.len() / 2 {
            bytes[at + n] = u8::from_str_radix(&digits[2 * n..2 * n + 2], 16).unwrap();
        }
    }
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(FILE), bytes).unwrap();
    let past = Journal::open(folder.path()).unwrap().1;
    assert_eq!(format!("{past:?}"), format!("{expected:?}"));
    assert_eq!((past.open.len(), past.unsent.len()), (1, 1));
}

/// The rows of version 1, byte by byte: whoever changes them makes a version 2.
#[test]
fn rows_are_frozen() {
    let row = record::encode(&record::TaskRow::new(&task("a"), 42));
    let hex = |bytes: &[u8]| {
        let digits = bytes.iter().map(|b| format!("{b:02x}"));
        digits.collect::<String>()
    };
    assert_eq!(hex(&row), include_str!("frozen/task").trim());
    let row = record::encode(&record::SaidRow::new(
        &post(1, "a", true),
        Duration::from_secs(1),
    ));
    assert_eq!(hex(&row), include_str!("frozen/said").trim());
    let row = record::encode(&record::SaidRow::new(
        &compact(post(1, "a", true)),
        Duration::from_secs(1),
    ));
    assert_eq!(hex(&row), include_str!("frozen/said-compact").trim());
    let mut note = record::NoteRow::default();
    (note.begun, note.cancelled) = (3, true);
    note.move_to(&reply("x"));
    assert_eq!(
        hex(&record::encode(&note)),
        include_str!("frozen/note").trim()
    );
    assert_eq!(
        hex(&record::encode(&stamp())),
        include_str!("frozen/stamp").trim()
    );
}
