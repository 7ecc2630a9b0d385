//! The journal: rotated while changes are made, killed in the middle of it, and on a
//! disk that is full. No line that was answered for is lost.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use bg_tests::{
    api::{call, try_call},
    lab::{Lab, default_service},
    load::until,
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::Signal,
};
use serde_json::{Value, json};

/// All of the journal.
const ALL: [&str; 3] = ["history", "--limit", "1000000"];
/// A file of the smallest journal is put aside at this size.
const AT: u64 = (1 << 20) / 8;

fn lab() -> Lab {
    let lab = Lab::new().unwrap();
    let service = default_service();
    lab.configure(&format!("journal_max = \"1M\"\n{service}"))
        .unwrap();
    lab
}

fn state(lab: &Lab) -> PathBuf {
    lab.directory().join("state")
}

/// Lines before those of the daemon, until the next but few ones rotate it.
fn fill(lab: &Lab) {
    let file = state(lab).join("journal.jsonl");
    let mut journal = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&file)
        .unwrap();
    let line = json!({"time": "2020-11-21T15:02:10.000Z", "actor": "filler", "service": "*",
        "action": "reload", "phase": "result", "generation": 0, "detail": "x".repeat(800)});
    while fs::metadata(&file).unwrap().len() < AT - 3000 {
        writeln!(journal, "{line}").unwrap();
    }
}

fn aside(lab: &Lab) -> Vec<u64> {
    let names = fs::read_dir(state(lab)).unwrap().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    let mut numbers: Vec<u64> = names
        .filter_map(|name| name.strip_prefix("journal.jsonl.")?.parse().ok())
        .collect();
    numbers.sort_unstable();
    numbers
}

/// The reasons of the canaries whose results are in the journal.
fn told(lab: &Lab) -> Vec<String> {
    let history = lab.ask(&ALL).unwrap();
    assert_eq!(history["more"], false);
    let entries = history["entries"].as_array().unwrap().iter();
    entries
        .filter(|entry| entry["action"] == "canary" && entry["phase"] == "result")
        .map(|entry| entry["why"].as_str().unwrap().to_owned())
        .collect()
}

fn canary(lab: &Lab, number: usize) -> anyhow::Result<u16> {
    let percent = number % 50 + 1;
    let body = json!({"percent": percent, "force": true, "why": number.to_string()});
    let path = "/v1/services/llm/canary";
    let answer = try_call(lab, "POST", path, "", &body.to_string())?;
    assert_eq!(answer.body["warnings"], json!([]), "it was written");
    Ok(answer.status)
}

#[test]
fn a_daemon_that_is_killed_while_its_journal_rotates_loses_no_line() {
    let mut lab = lab();
    fs::create_dir_all(state(&lab)).unwrap();
    let mut answered: Vec<String> = Vec::new();
    let mut number = 0;
    for round in 0..6 {
        fill(&lab);
        lab.start().unwrap();
        let (killed, changes) = (lab.daemon_pid().unwrap() as i32, 4 + 3 * round);
        std::thread::scope(|scope| {
            let (done, count) = std::sync::mpsc::channel();
            let (lab, answered, number) = (&lab, &mut answered, &mut number);
            scope.spawn(move || {
                // Until it is killed, in the middle of whatever it does.
                while canary(lab, *number).is_ok_and(|status| status == 200) {
                    answered.push(number.to_string());
                    *number += 1;
                    let _ = done.send(());
                }
                *number += 1;
            });
            for _ in 0..changes {
                count.recv().unwrap();
            }
            let killed = nix::unistd::Pid::from_raw(killed);
            nix::sys::signal::kill(killed, Signal::SIGKILL).unwrap();
        });
        lab.end_daemon(Signal::SIGKILL).unwrap();
    }
    // Without the daemon, and with it.
    let (code, out, _) = lab.tell(&[&["-o", "json"], &ALL[..]].concat()).unwrap();
    assert_eq!(code, 0);
    let alone: Value = serde_json::from_str(&out).unwrap();
    lab.start().unwrap();
    let told = told(&lab);
    for why in &answered {
        let times = told.iter().filter(|told| *told == why).count();
        assert_eq!(times, 1, "{why} of {answered:?} in {told:?}");
    }
    let numbers: Vec<usize> = told.iter().map(|why| why.parse().unwrap()).collect();
    assert!(numbers.is_sorted(), "{numbers:?}");
    let with = lab.ask(&ALL).unwrap();
    let both = alone["entries"].as_array().unwrap();
    let with = with["entries"].as_array().unwrap();
    assert_eq!(both[..], with[..both.len()], "the same without the daemon");
    assert!(aside(&lab).len() >= 5, "it rotated: {:?}", aside(&lab));
}

#[test]
fn a_journal_takes_no_more_room_than_it_may() {
    let mut lab = lab();
    fs::create_dir_all(state(&lab)).unwrap();
    for number in 0..12 {
        fill(&lab);
        let file = state(&lab).join("journal.jsonl");
        fs::rename(file, state(&lab).join(format!("journal.jsonl.{number}"))).unwrap();
    }
    fill(&lab);
    lab.start().unwrap();
    for number in 0.. {
        canary(&lab, number).unwrap();
        if aside(&lab).last() == Some(&12) {
            break;
        }
    }
    until("the oldest ones are gone", || {
        aside(&lab) == [6, 7, 8, 9, 10, 11, 12]
    });
    let files = fs::read_dir(state(&lab)).unwrap().flatten();
    let journals = files.filter(|file| {
        let name = file.file_name().into_string().unwrap();
        name.starts_with("journal.jsonl")
    });
    let size: u64 = journals.map(|file| file.metadata().unwrap().len()).sum();
    assert!(size <= (1 << 20) + 4096, "{size}");

    // The size is read at the start only.
    let larger = format!("journal_max = \"2M\"\n{}", default_service());
    lab.configure(&larger).unwrap();
    let (code, _, err) = lab.tell(&["reload"]).unwrap();
    assert_eq!(code, 2);
    assert!(err.contains("gateway.journal_max changed, which is read at the start only"));
}

/// A file system of its own for the state, gone with it.
struct SmallDisk<'a>(&'a Path);

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

/// Law 5, and no change without its line: a disk without room stops flips, never
/// rollbacks, and what was written before is whole.
#[test]
fn a_full_disk_stops_flips_and_no_rollback() {
    let mut lab = lab();
    let state = state(&lab);
    fs::create_dir_all(&state).unwrap();
    let flags = MsFlags::empty();
    mount(
        Some("bgswitch-small"),
        &state,
        Some("tmpfs"),
        flags,
        Some("size=512k"),
    )
    .unwrap();
    let disk = SmallDisk(&state);
    lab.start().unwrap();
    lab.ask(&["flip", "llm"]).unwrap();
    let before = lab.ask(&["history"]).unwrap()["entries"].clone();
    let filler = state.join("filler");
    let mut file = fs::File::create(&filler).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
    // What is left of the journal's last page is used up by changes that fail then.
    let path = "/v1/services/llm/flip";
    let mut generation = 1;
    until("a flip is refused", || {
        let flipped = call(&lab, "POST", path, "", "{}");
        generation = flipped.body["generation"].as_u64().unwrap_or(generation);
        flipped.status == 500
            && flipped.body["error"]
                .as_str()
                .unwrap()
                .contains("No space left")
    });
    let (code, _, err) = lab.tell(&["rollback", "llm"]).unwrap();
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("No space left on device"), "{err}");
    let active = &lab.status().unwrap()["services"][0];
    assert_eq!(active["generation"], generation + 1);

    drop(file);
    fs::remove_file(&filler).unwrap();
    lab.ask(&["flip", "llm"]).unwrap();
    let after = lab.ask(&["history"]).unwrap()["entries"].clone();
    let (before, after) = (before.as_array().unwrap(), after.as_array().unwrap());
    assert_eq!(before[..], after[..before.len()]);
    let last = after.last().unwrap();
    assert_eq!(
        (&last["action"], &last["phase"]),
        (&json!("flip"), &json!("result"))
    );
    drop(disk);
}

/// However much the journal has, no more of it is read than is asked for, with the daemon
/// and without it.
#[test]
fn the_end_of_a_large_journal_is_told_without_reading_the_rest() {
    let mut lab = lab();
    fs::create_dir_all(state(&lab)).unwrap();
    // A file that nobody could have in memory, put aside: 1 TiB of a hole.
    let hole = fs::File::create(state(&lab).join("journal.jsonl.1")).unwrap();
    hole.set_len(1 << 40).unwrap();
    fill(&lab);
    let full = state(&lab).join("journal.jsonl");
    fs::rename(full, state(&lab).join("journal.jsonl.2")).unwrap();
    fill(&lab);
    lab.start().unwrap();
    for number in 0..20 {
        canary(&lab, number).unwrap();
    }
    let last = |words: &[&str]| {
        let history = lab.ask(&[&["history"], words].concat()).unwrap();
        let entries = history["entries"].as_array().unwrap().clone();
        (entries, history["more"].clone())
    };
    let is_result = |entry: &Value, why: &str| entry["why"] == why && entry["phase"] == "result";
    let (three, more) = last(&["--limit", "3"]);
    assert_eq!((three.len(), more), (3, json!(true)));
    assert!(
        is_result(&three[0], "18") && is_result(&three[2], "19"),
        "{three:?}"
    );
    let (usual, more) = last(&[]);
    assert!(
        usual.len() <= 200 && usual.ends_with(&three),
        "{}",
        usual.len()
    );
    assert_eq!(more, json!(true));
    // Fillers are years old: what came before them, the hole, is not looked at.
    let (hour, more) = last(&["--since", "1h", "--limit", "100000"]);
    assert_eq!(
        (hour.len(), more),
        (42, json!(false)),
        "a start, and twenty canaries"
    );
    let since = hour[40]["time"].as_str().unwrap();
    let (rest, _) = last(&["--since", since]);
    assert!(
        hour.ends_with(&rest) && (2..6).contains(&rest.len()),
        "{rest:?}"
    );
    let (_, out, _) = lab.tell(&["history", "--limit", "4"]).unwrap();
    assert!(
        out.starts_with("(older ones are not shown: --limit, --since)\n"),
        "{out}"
    );
    assert_eq!(out.lines().count(), 3, "{out}");
    for wrong in ["soon", "2026-13-01T00:00:00Z"] {
        let (code, _, err) = lab.tell(&["history", "--since", wrong]).unwrap();
        assert_eq!(code, 2);
        assert!(err.contains("no duration like 2h"), "{err}");
    }
    lab.end_daemon(Signal::SIGKILL).unwrap();
    let (code, out, _) = lab
        .tell(&["-o", "json", "history", "--limit", "3"])
        .unwrap();
    let alone: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &alone["entries"]), (0, &json!(three)));
}
