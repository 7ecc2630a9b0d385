//! `bgswitch top` of a real daemon: as text, and on a terminal, which it leaves as it was.

use bg_tests::{
    conversation::Conversation,
    lab::{Lab, Place, default_service, listener},
    load::until,
    terminal::Terminal,
};
use nix::sys::signal::{Signal, kill};

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

const ENTERS: &str = "\x1b[?1049h";
const LEAVES: &str = "\x1b[?1049l";

/// On a terminal, once it is drawn on.
fn shown_by(lab: &Lab) -> Terminal {
    let mut shown = Terminal::start(lab, &["top"], 130).unwrap();
    shown.until_seen(ENTERS);
    shown
}

/// Its exit code, once it has left the terminal.
fn end(mut shown: Terminal) -> i32 {
    shown.until_seen(LEAVES);
    shown.end().unwrap()
}

#[test]
fn a_terminal_is_drawn_on_and_left_as_it_was() {
    let mut lab = lab();
    let mut shown = shown_by(&lab);
    shown.until_seen("llm");
    shown.press("j").unwrap();
    // Once in the list, once as the chosen one.
    until("the other one is chosen", || {
        shown.seen().matches("zzz-web").count() > 1
    });
    // The daemon goes, and comes again; the screen says so, and stays.
    lab.end_daemon(Signal::SIGTERM).unwrap();
    shown.until_seen("the daemon is not running");
    lab.start().unwrap();
    lab.ask(&["flip", "zzz-web", "--force", "-m", "seen-by-top"])
        .unwrap();
    shown.until_seen("seen-by-top");
    shown.press("s").unwrap();
    shown.press("q").unwrap();
    assert_eq!(end(shown), 0);

    // Ctrl-C, and a signal.
    let mut shown = shown_by(&lab);
    shown.press("\x03").unwrap();
    assert_eq!(end(shown), 0);
    let shown = shown_by(&lab);
    kill(shown.pid(), Signal::SIGTERM).unwrap();
    assert_eq!(end(shown), 0);
}
