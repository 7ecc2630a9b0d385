//! The screen, of what a daemon really told (`seen.json`).

use std::time::Duration;

use ratatui::{Terminal, backend::TestBackend};
use serde_json::Value;

use super::{
    model::{Sample, Screen, Sort},
    view,
};
use crate::api::{History, ReleaseStatus, Status};

/// What the API told, with changes of `status`.
fn sample(change: impl FnOnce(&mut Value)) -> Sample {
    let mut seen: Value = serde_json::from_str(include_str!("seen.json")).unwrap();
    change(&mut seen["status"]);
    let status: Status = serde_json::from_value(seen["status"].take()).unwrap();
    let release: ReleaseStatus = serde_json::from_value(seen["release"].take()).unwrap();
    let history: History = serde_json::from_value(seen["history"].take()).unwrap();
    let releases = [(release.service, release.release.unwrap())];
    Sample::new(status, releases.into(), history.entries)
}

/// Two looks, two seconds apart, between which packets came.
fn screen(sort: Sort) -> Screen {
    let before = sample(|_| {});
    let mut now = sample(|status| {
        let services = &mut status["services"];
        services[1]["colours"]["blue"]["packets"] = 2469.into();
        let blue = &mut services[0]["colours"]["blue"];
        blue["new_flows"] = 3.into();
        blue["signals"]["refused"] = 2.into();
        blue["signals"]["answers"] = 40.into();
        blue["signals"]["status"] = vec![0, 30, 0, 0, 10].into();
        blue["signals"]["answer"]["p90_us"] = 1500.into();
        status["reasons"]["no_backend"] = 9.into();
        status["reasons"]["truncated"] = 30.into();
    });
    now.at = before.at + Duration::from_secs(2);
    let mut screen = Screen::new(before, sort);
    screen.take(now);
    screen
}

#[track_caller]
fn assert_line(text: &str, begin: &str, parts: &[&str]) {
    let line = text.lines().find(|line| line.starts_with(begin));
    let line = line.unwrap_or_else(|| panic!("no {begin:?} in\n{text}"));
    for part in parts {
        assert!(line.contains(part), "{part:?} in {line:?}");
    }
}

#[test]
fn the_frame_says_what_the_api_told() {
    let text = view::text(&screen(Sort::Name));
    assert_line(
        &text,
        "bgswitch 0.1.0",
        &["a native, b native", "flow table 0 of 1 "],
    );
    assert_line(
        &text,
        "llm ",
        &["blue", "BAKING", "1.5", "standby, if all is well at "],
    );
    assert_line(&text, "web ", &["STEADY", "1 235"]);
    assert_line(&text, "  r-1 BAKING: new flows go to blue", &[]);
    assert_line(
        &text,
        "  blue  active",
        &["llama@6", "refused 1.0/s", "5xx 5.0 of 20/s", "p90 1.5 ms"],
    );
    assert_line(&text, "        10.0.1.11:8000", &["no next hop"]);
    assert_line(
        &text,
        "not forwarded  truncated 15/s  no_backend 4.5/s",
        &[],
    );
    assert!(text.contains("root(0)"), "{text}");
}

#[test]
fn a_service_is_chosen_and_all_are_sorted() {
    let mut screen = screen(Sort::Packets);
    let names = |screen: &Screen| -> Vec<String> {
        let services = screen.services().into_iter();
        services.map(|service| service.name.clone()).collect()
    };
    assert_eq!(names(&screen), ["web", "llm"]);
    let chosen = |screen: &Screen| screen.chosen().unwrap().name.clone();
    // It was the first one before packets came, and stays chosen.
    assert_eq!(chosen(&screen), "llm");
    screen.down();
    assert_eq!(chosen(&screen), "llm");
    screen.up();
    assert_eq!(chosen(&screen), "web");
    screen.up();
    assert_eq!(chosen(&screen), "web");
    screen.down();
    assert_eq!(chosen(&screen), "llm");
    for sort in [Sort::Name, Sort::Flows, Sort::NewFlows] {
        screen.sort = screen.sort.next();
        assert_eq!(screen.sort, sort);
        assert_eq!(names(&screen), ["llm", "web"]);
    }
    assert!(screen.choose("lmm").is_err());
    // One that a reload takes away is chosen no more.
    screen.take(sample(|status| {
        status["services"].as_array_mut().unwrap().remove(0);
    }));
    assert_eq!(chosen(&screen), "web");
}

#[test]
fn it_is_drawn_at_any_size() {
    let mut screen = screen(Sort::Name);
    let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
    for (width, height) in [(1, 1), (3, 2), (20, 5), (80, 24), (500, 200), (40, 9)] {
        terminal.backend_mut().resize(width, height);
        terminal.draw(|frame| view::draw(frame, &screen)).unwrap();
        assert_eq!(terminal.backend().buffer().area.width, width);
    }
    // What is wrong takes the first line, and the rest stays.
    screen.trouble = Some("the daemon is not running".to_owned());
    let text = view::text(&screen);
    assert!(text.starts_with("the daemon is not running"), "{text}");
    assert_line(&text, "llm ", &["BAKING"]);
}
