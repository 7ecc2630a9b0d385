//! Metrics of what the packet path hears of servers: they say what `status` says, and what
//! clients really did.

use std::{net::TcpStream, sync::Arc};

use bg_tests::{
    conversation::Conversation,
    kernel::in_namespace,
    lab::{Lab, Place, default_service, listener},
    load::{Mood, until},
    scrape::{Families, find, sample, scrape},
};
use serde_json::Value;

fn metrics(lab: &Lab) -> Families {
    scrape(lab, "127.0.0.1:9464".parse().unwrap()).unwrap()
}

/// A service that is listened to, with green servers of a mood.
fn lab(mood: &Arc<Mood>) -> Lab {
    let service = default_service().replace(":8001\"", ":8005\"");
    let service = format!("metrics = \"127.0.0.1:9464\"\n{service}[service.llm.bake]\n");
    Lab::new().unwrap().served_in(&service, mood).unwrap()
}

#[test]
#[allow(clippy::float_cmp, reason = "they are counts")]
fn connections_answers_and_times_are_counted_by_colour() {
    let mood = Arc::default();
    let lab = lab(&mood);
    let client = lab.enter(Place::Client).unwrap();
    let mut talks: Vec<Conversation> = (0..5)
        .map(|_| Conversation::open(&client, listener(8000)).unwrap())
        .collect();
    for _ in 0..4 {
        for talk in &mut talks {
            assert_eq!(talk.ask().unwrap(), "blue");
        }
    }
    lab.ask(&["flip", "llm"]).unwrap();
    // Every answer of green fails, and nobody listens on one of its ports.
    mood.fail(1000);
    let mut bad = Conversation::open(&client, listener(8000)).unwrap();
    let _ = bad.ask();
    let refused = in_namespace(&client, || TcpStream::connect(listener(8005)));
    assert!(refused.is_err());

    let of = |families: &Families, name: &str, colour: &str| {
        let labels = [("service", "llm"), ("colour", colour)];
        sample(families, &format!("bgswitch_{name}"), &labels)
    };
    let class = |families: &Families, colour: &str, class: &str| {
        let labels = [("service", "llm"), ("colour", colour), ("class", class)];
        sample(families, "bgswitch_answers_total", &labels)
    };
    until("all of it is told", || {
        let all = metrics(&lab);
        of(&all, "connections_total", "blue") == 5.0
            && class(&all, "blue", "2xx") == 20.0
            && of(&all, "connections_refused_total", "green") == 1.0
            && class(&all, "green", "5xx") == 1.0
    });
    let all = metrics(&lab);
    assert_eq!(of(&all, "connections_accepted_total", "blue"), 5.0);
    assert_eq!(of(&all, "connections_refused_total", "blue"), 0.0);
    assert_eq!(class(&all, "blue", "5xx"), 0.0);
    // A histogram has each answer once, and its buckets grow up to all of them.
    for (name, count) in [("answer", 20.0), ("handshake", 5.0)] {
        assert_eq!(of(&all, &format!("{name}_seconds_count"), "blue"), count);
        assert!(of(&all, &format!("{name}_seconds_sum"), "blue") > 0.0);
        let infinite = [("le", "+Inf"), ("service", "llm"), ("colour", "blue")];
        let bucket = format!("bgswitch_{name}_seconds_bucket");
        assert_eq!(sample(&all, &bucket, &infinite), count);
    }
    // And `status` says the same.
    let status = lab.status().unwrap();
    for colour in ["blue", "green"] {
        let heard = &status["services"][0]["colours"][colour]["signals"];
        for (metric, field) in [
            ("connections_total", "opened"),
            ("connections_retried_total", "opened_again"),
            ("connections_accepted_total", "accepted"),
            ("connections_refused_total", "refused"),
            ("connections_reset_total", "reset"),
            ("requests_total", "asked"),
            ("requests_retried_total", "asked_again"),
            ("segments_repeated_total", "repeated"),
        ] {
            let expected = heard[field].as_f64().unwrap();
            assert_eq!(of(&all, metric, colour), expected, "{colour} {metric}");
        }
        let told = heard["status"]
            .as_array()
            .unwrap()
            .iter()
            .map(Value::as_f64);
        for (name, expected) in ["1xx", "2xx", "3xx", "4xx", "5xx"].iter().zip(told) {
            assert_eq!(Some(class(&all, colour, name)), expected, "{colour} {name}");
        }
    }
}

/// Where nobody listens, nothing is told, rather than nothing heard.
#[test]
fn a_service_that_is_not_listened_to_has_no_such_metrics() {
    let service = format!("metrics = \"127.0.0.1:9464\"\n{}", default_service());
    let lab = Lab::new().unwrap().served_as(&service).unwrap();
    let labels = [("service", "llm"), ("colour", "blue")];
    assert_eq!(
        find(&metrics(&lab), "bgswitch_connections_total", &labels),
        None
    );
}
