//! `bgswitch top` of a real daemon: as text, and on a terminal, which it leaves as it was.

use std::{
    io::{Read as _, Write as _},
    process::{Child, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
};

use bg_tests::{
    conversation::Conversation,
    lab::{Lab, Place, default_service, listener},
    load::until,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A second service, so that there is one to choose.
const WEB: &str = "[service.zzz-web]\nlisten = [\"tcp://203.0.113.20:443\"]\n\
                   [service.zzz-web.blue]\nbackends = [\"10.0.1.10:8443\"]\n\
                   [service.zzz-web.green]\nbackends = [\"10.0.2.10:8443\"]\n";

fn lab() -> Lab {
    let service = default_service() + "[service.llm.bake]\n" + WEB;
    Lab::new().unwrap().served_as(&service).unwrap()
}

#[test]
fn a_frame_as_text_says_what_is_live_and_what_happened() {
    let mut lab = lab();
    let client = lab.enter(Place::Client).unwrap();
    let mut talk = Conversation::open(&client, listener(8000)).unwrap();
    assert_eq!(talk.ask().unwrap(), "blue");
    lab.ask(&["flip", "llm", "-m", "a new model"]).unwrap();
    lab.ask(&["canary", "zzz-web", "25"]).unwrap();
    // Without a terminal it is one frame, too.
    for words in [&["top", "--once"][..], &["top"]] {
        let (code, out, err) = lab.tell(words).unwrap();
        assert_eq!((code, err.as_str()), (0, ""), "{out}");
        let line = |begin: &str| out.lines().find(|line| line.starts_with(begin)).unwrap();
        assert!(
            line("bgswitch ").contains("clients native, blue native, green native"),
            "{out}"
        );
        let llm: Vec<&str> = line("llm ").split_whitespace().collect();
        assert_eq!(llm[..4], ["llm", "green", "1", "draining"], "{out}");
        assert!(line("llm ").contains("1 flow of blue reset at "), "{out}");
        let web: Vec<&str> = line("zzz-web ").split_whitespace().collect();
        assert_eq!(web[..5], ["zzz-web", "blue", "0", "25", "%"], "{out}");
        assert!(line("  blue  standby").contains("model@1"), "{out}");
        assert!(
            line("  green active").contains("refused 0/s  reset 0/s  5xx 0 of 0/s"),
            "{out}"
        );
        assert!(line("        10.0.1.10").contains("healthy"), "{out}");
        assert!(line("not forwarded  ").len() > 16, "{out}");
        assert!(out.contains("blue -> green, drain  (a new model)"), "{out}");
    }
    let (_, out, _) = lab.tell(&["top", "zzz-web", "--once"]).unwrap();
    assert!(out.contains("\nzzz-web  tcp://203.0.113.20:443\n"), "{out}");
    assert_eq!(lab.tell(&["top", "lmm"]).unwrap().0, 2);
    lab.end_daemon(Signal::SIGTERM).unwrap();
    assert_eq!(lab.tell(&["top"]).unwrap().0, 3);
}

/// `bgswitch top` on a terminal of its own.
struct Shown {
    child: Child,
    bytes: Receiver<Vec<u8>>,
    seen: String,
}

const ENTERS: &str = "\x1b[?1049h";
const LEAVES: &str = "\x1b[?1049l";

impl Shown {
    fn start(lab: &Lab) -> Self {
        let words = lab.bgswitch(&["top"]).unwrap();
        let line: Vec<&str> = [words.get_program()]
            .into_iter()
            .chain(words.get_args())
            .map(|word| word.to_str().unwrap())
            .collect();
        let line = format!(
            "stty rows 40 cols 130; echo pid $$; exec {}",
            line.join(" ")
        );
        let mut command = lab.command(Place::Gateway, "script").unwrap();
        let mut child = command
            .args(["-qefc", &line, "/dev/null"])
            .env("TERM", "xterm-256color")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = child.stdout.take().unwrap();
        let (sender, bytes) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = out.read(&mut buffer) {
                let _ = sender.send(buffer[..read].to_vec());
            }
        });
        let seen = String::new();
        Self { child, bytes, seen }
    }

    fn read(&mut self) {
        for bytes in self.bytes.try_iter() {
            self.seen += &String::from_utf8_lossy(&bytes);
        }
    }

    fn until_seen(&mut self, text: &str) {
        until(&format!("{text:?} is seen"), || {
            self.read();
            self.seen.contains(text)
        });
    }

    fn press(&mut self, keys: &str) {
        let input = self.child.stdin.as_mut().unwrap();
        input.write_all(keys.as_bytes()).unwrap();
        input.flush().unwrap();
    }

    fn pid(&self) -> Pid {
        let pid = self.seen.split("pid ").nth(1).unwrap();
        let digits = pid.split(|c: char| !c.is_ascii_digit()).next().unwrap();
        Pid::from_raw(digits.parse().unwrap())
    }

    /// Its exit code.
    fn end(mut self) -> i32 {
        self.until_seen(LEAVES);
        self.child.wait().unwrap().code().unwrap()
    }
}

#[test]
fn a_terminal_is_drawn_on_and_left_as_it_was() {
    let mut lab = lab();
    let mut shown = Shown::start(&lab);
    shown.until_seen(ENTERS);
    shown.until_seen("llm");
    shown.press("j");
    // Once in the list, once as the chosen one.
    until("the other one is chosen", || {
        shown.read();
        shown.seen.matches("zzz-web").count() > 1
    });
    // The daemon goes, and comes again; the screen says so, and stays.
    lab.end_daemon(Signal::SIGTERM).unwrap();
    shown.until_seen("the daemon is not running");
    lab.start().unwrap();
    lab.ask(&["flip", "zzz-web", "--force", "-m", "seen-by-top"])
        .unwrap();
    shown.until_seen("seen-by-top");
    shown.press("s");
    shown.press("q");
    assert_eq!(shown.end(), 0);

    // Ctrl-C, and a signal.
    let mut shown = Shown::start(&lab);
    shown.until_seen(ENTERS);
    shown.press("\x03");
    assert_eq!(shown.end(), 0);
    let mut shown = Shown::start(&lab);
    shown.until_seen(ENTERS);
    kill(shown.pid(), Signal::SIGTERM).unwrap();
    assert_eq!(shown.end(), 0);
}
