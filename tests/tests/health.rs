//! Health of backends, with real servers that fall ill, die and come back: who gets
//! new flows, who keeps old ones, and which flips are refused.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    fs::{self, File},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use bg_tests::{
    conversation::Conversation,
    lab::{Lab, Place, SERVICE, listener},
    load::{self, Load, Reuse, in_place, now_ns, until},
};
use http_body_util::Full;
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
};

const B1: &str = "10.0.1.10";
const B2: &str = "10.0.1.11";
const G1: &str = "10.0.2.10";
const G2: &str = "10.0.2.11";
const SERVERS: [(Place, &str); 4] = [
    (Place::Blue, B1),
    (Place::Blue, B2),
    (Place::Green, G1),
    (Place::Green, G2),
];

/// How often servers are probed, where it shall not take long.
const OFTEN: &str = "200ms";

fn service(interval: &str) -> String {
    format!(
        "[service.llm]\nlisten = [\"tcp://{SERVICE}:8000\"]\n\
         [service.llm.blue]\nbackends = [\"{B1}\", \"{B2}\"]\n\
         [service.llm.green]\nbackends = [\"{G1}\", \"{G2}\"]\n\
         [service.llm.health]\nkind = \"http\"\npath = \"/health\"\ninterval = \"{interval}\"\n\
         timeout = \"2s\"\nrise = 2\nfall = 2\n"
    )
}

/// One server, which answers with its address, and says of itself whether it is well.
/// Its connections end with it.
struct Server {
    ill: Arc<AtomicBool>,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Server {
    fn start(lab: &Lab, (place, address): (Place, &'static str)) -> Self {
        let ill = Arc::new(AtomicBool::new(false));
        let (end, ended) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let says = Arc::clone(&ill);
        let thread = in_place(lab.enter(place).unwrap(), move || async move {
            let at: SocketAddr = format!("{address}:8000").parse()?;
            let listener = TcpListener::bind(at).await?;
            ready.send(())?;
            tokio::task::spawn_local(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::task::spawn_local(serve(stream, address, Arc::clone(&says)));
                }
            });
            let _ = ended.await;
            Ok(())
        });
        is_ready.recv().unwrap();
        Self {
            ill,
            end: Some(end),
            thread: Some(thread),
        }
    }

    fn falls_ill(&self) {
        self.ill.store(true, Ordering::Relaxed);
    }

    fn gets_well(&self) {
        self.ill.store(false, Ordering::Relaxed);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.end.take());
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(matches!(ended, Some(Ok(Ok(())))), "the server ended well");
    }
}

async fn serve(stream: TcpStream, name: &'static str, ill: Arc<AtomicBool>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let is_ill = request.uri().path() == "/health" && ill.load(Ordering::Relaxed);
        let answer = Response::builder().status(if is_ill { 503 } else { 200 });
        async move { Ok::<_, Infallible>(answer.body(Full::new(Bytes::from(name))).unwrap()) }
    });
    let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    // A client that goes away is no concern of the server.
    let _ = connection.await;
}

/// A gateway and its four servers, all known to be well.
fn healthy() -> (Lab, [Server; 4]) {
    let mut lab = Lab::new().unwrap();
    let servers = SERVERS.map(|server| Server::start(&lab, server));
    lab.configure(&service(OFTEN)).unwrap();
    lab.start().unwrap();
    until("all are well", || {
        SERVERS.iter().all(|(_, address)| is(&lab, address, true))
    });
    (lab, servers)
}

/// A backend in `status`.
fn backend(lab: &Lab, address: &str) -> Value {
    let status = lab.status().unwrap();
    let colours = status["services"][0]["colours"].as_object().unwrap();
    let mut backends = colours
        .values()
        .flat_map(|c| c["backends"].as_array().unwrap());
    let wanted = format!("{address}:8000");
    backends
        .find(|b| b["address"] == wanted.as_str())
        .unwrap()
        .clone()
}

/// Whether a backend is healthy and in its pool, or neither.
fn is(lab: &Lab, address: &str, well: bool) -> bool {
    let backend = backend(lab, address);
    backend["healthy"] == well && backend["in_pool"] == well
}

fn all_down(lab: &Lab, colour: &str) -> bool {
    let status = lab.status().unwrap();
    status["services"][0]["colours"][colour]["all_down"] == true
}

/// Who answers a hundred new connections.
fn answering(lab: &Lab) -> BTreeSet<String> {
    let client = lab.enter(Place::Client).unwrap();
    let once = || {
        Conversation::open(&client, listener(8000))
            .unwrap()
            .ask()
            .unwrap()
    };
    (0..100).map(|_| once()).collect()
}

fn names<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

/// A conversation with one certain server.
fn conversation_with(client: &File, server: &str) -> Conversation {
    let mut conversations = (0..200).map(|_| Conversation::open(client, listener(8000)).unwrap());
    let is_with = |conversation: &mut Conversation| conversation.ask().unwrap() == server;
    conversations
        .find_map(|mut c| is_with(&mut c).then_some(c))
        .unwrap()
}

/// What the journal says of an action, newest last.
fn told(lab: &Lab, action: &str) -> Vec<String> {
    let history = lab.ask(&["history"]).unwrap();
    let entries = history["entries"].as_array().unwrap().iter();
    let of = entries.filter(|e| e["action"] == action && e["phase"] == "result");
    of.map(|entry| entry["detail"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn new_flows_avoid_a_backend_that_died_until_it_is_back() {
    let (lab, servers) = healthy();
    let [dies, _b2, _g1, _g2] = servers;
    let client = lab.enter(Place::Client).unwrap();
    let mut elsewhere = conversation_with(&client, B2);
    let clients = vec![(listener(8000), Reuse::Never); 4];
    let load = Load::start(client, clients, Duration::from_millis(2));
    load.advance(50);
    drop(dies);
    until("it is out of its pool", || is(&lab, B1, false));
    let fell = now_ns();
    load.advance(200);
    assert_eq!(answering(&lab), names([B2]));
    assert_eq!(elsewhere.ask().unwrap(), B2);
    let (_, text, _) = lab.tell(&["status"]).unwrap();
    for part in [
        "UNHEALTHY since ",
        "port 8000: Connection refused",
        "(gets no new flows)",
    ] {
        assert!(text.contains(part), "{part:?} in\n{text}");
    }
    let told_of_fall = told(&lab, "fall").pop().unwrap();
    assert!(
        told_of_fall.starts_with("blue 10.0.1.10: port 8000: "),
        "{told_of_fall}"
    );
    assert!(
        told_of_fall.ends_with("; out of the pool, 1 of 2 in it"),
        "{told_of_fall}"
    );

    let _back = Server::start(&lab, SERVERS[0]);
    until("it is back in its pool", || is(&lab, B1, true));
    assert_eq!(answering(&lab), names([B1, B2]));
    assert_eq!(elsewhere.ask().unwrap(), B2);
    let told_of_rise = told(&lab, "rise").pop().unwrap();
    assert!(
        told_of_rise.starts_with("blue 10.0.1.10 answers again after "),
        "{told_of_rise}"
    );
    assert!(
        told_of_rise.ends_with("; in the pool, 2 of 2 in it"),
        "{told_of_rise}"
    );

    let answers = load.finish().unwrap();
    let after = |answer: &&load::Answer| answer.connected_ns > fell;
    let after: Vec<load::Answer> = answers.iter().filter(after).cloned().collect();
    load::assert_flawless(&after);
}

/// Law 2.
#[test]
fn established_flows_stay_with_a_backend_that_fell() {
    let (lab, [b1, _b2, _g1, _g2]) = healthy();
    let client = lab.enter(Place::Client).unwrap();
    let mut stays = conversation_with(&client, B1);
    b1.falls_ill();
    until("it is out of its pool", || is(&lab, B1, false));
    assert_eq!(answering(&lab), names([B2]));
    assert_eq!(stays.ask().unwrap(), B1);
    assert_eq!(backend(&lab, B1)["health"]["why"], "HTTP status 503");
    b1.gets_well();
    until("it is back in its pool", || is(&lab, B1, true));
    assert_eq!(stays.ask().unwrap(), B1);
}

/// Law 6.
#[test]
fn a_pool_of_which_all_fell_keeps_all_of_them_and_says_so() {
    let (lab, [b1, b2, _g1, _g2]) = healthy();
    b1.falls_ill();
    b2.falls_ill();
    until("both are down", || all_down(&lab, "blue"));
    assert_eq!(answering(&lab), names([B1, B2]));
    let (_, text, _) = lab.tell(&["status"]).unwrap();
    assert!(
        text.contains("ALL DOWN: new flows go to all of them\n"),
        "{text}"
    );
    let last = told(&lab, "fall").pop().unwrap();
    let kept = "HTTP status 503; no healthy one is left: the pool keeps all of them";
    assert!(last.ends_with(kept), "{last}");
    // The first one that rises has the pool for itself.
    b2.gets_well();
    until("one is back", || is(&lab, B2, true) && is(&lab, B1, false));
    assert_eq!(answering(&lab), names([B2]));
    assert!(!all_down(&lab, "blue"));
}

/// Law 5, and what an operator is told.
#[test]
fn flips_to_an_ill_colour_are_refused_and_rollbacks_never() {
    let (lab, [b1, b2, g1, g2]) = healthy();
    g1.falls_ill();
    until("one of green is ill", || is(&lab, G1, false));
    let (code, _, err) = lab.tell(&["flip", "llm", "--dry-run"]).unwrap();
    assert_eq!(code, 0, "{err}");
    assert_eq!(
        err,
        "bgswitch: warning: 1 of 2 backends of green are healthy, not 10.0.2.10 (HTTP status 503)\n"
    );
    g2.falls_ill();
    until("all of green are ill", || all_down(&lab, "green"));
    for words in [["flip", "llm", "--dry-run"], ["flip", "llm", "--to=green"]] {
        let (code, out, err) = lab.tell(&words).unwrap();
        assert_eq!((code, out.as_str()), (8, ""), "{words:?}");
        assert_eq!(
            err,
            "bgswitch: llm was not flipped: no backend of green is known to be healthy: 10.0.2.10 (HTTP status \
             503), 10.0.2.11 (HTTP status 503). `bgswitch flip --force` flips all the same\n"
        );
    }
    let (code, _, err) = lab.tell(&["canary", "llm", "5"]).unwrap();
    assert_eq!(code, 8, "{err}");
    assert!(err.starts_with("bgswitch: the canary of llm was not changed: no backend of green"));
    assert_eq!(lab.tell(&["canary", "llm", "0"]).unwrap().0, 0);

    let (code, _, err) = lab.tell(&["flip", "llm", "--force"]).unwrap();
    assert_eq!(code, 0, "{err}");
    assert!(
        err.contains("warning: no backend of green is known to be healthy"),
        "{err}"
    );
    let flip = told(&lab, "flip").pop().unwrap();
    let forced = "blue -> green, drain, forced: no backend of green is known to be healthy: ";
    assert!(flip.starts_with(forced), "{flip}");

    b1.falls_ill();
    b2.falls_ill();
    until("all of blue are ill", || all_down(&lab, "blue"));
    let (code, out, err) = lab.tell(&["rollback", "llm"]).unwrap();
    assert_eq!(code, 0, "{err}");
    assert!(out.starts_with("llm  green -> blue "), "{out}");
    assert!(
        err.contains("warning: no backend of blue is known to be healthy"),
        "{err}"
    );
}

/// Laws 3 and 4: who is out is out until a probe of the new daemon's says otherwise,
/// and who is in is in.
#[test]
fn a_daemon_that_starts_keeps_the_pools_until_its_probes_have_spoken() {
    let (mut lab, [b1, _b2, _g1, _g2]) = healthy();
    b1.falls_ill();
    until("it is out of its pool", || is(&lab, B1, false));
    lab.end_daemon(Signal::SIGKILL).unwrap();
    assert_eq!(answering(&lab), names([B2]));

    b1.gets_well();
    // Each server is probed once, which is too little for a verdict.
    lab.configure(&service("1h")).unwrap();
    lab.start().unwrap();
    assert_eq!(backend(&lab, B1)["in_pool"], false);
    until("all have been probed", || {
        SERVERS.iter().all(|(_, address)| {
            backend(&lab, address)["health"]["why"] == "answers (1 of 2 probes)"
        })
    });
    assert_eq!(backend(&lab, B1)["healthy"], Value::Null);
    assert_eq!(backend(&lab, B1)["in_pool"], false);
    assert_eq!(backend(&lab, B2)["healthy"], Value::Null);
    assert_eq!(backend(&lab, B2)["in_pool"], true);
    assert_eq!(answering(&lab), names([B2]));
    let (code, _, err) = lab.tell(&["flip", "llm"]).unwrap();
    assert_eq!(code, 8, "{err}");
    assert!(err.contains("10.0.2.10 (answers (1 of 2 probes))"), "{err}");

    // A reload whose probes have said nothing yet does not change that either.
    lab.configure(&service("59m")).unwrap();
    lab.ask(&["reload"]).unwrap();
    assert_eq!(backend(&lab, B1)["in_pool"], false);
    assert_eq!(answering(&lab), names([B2]));

    lab.configure(&service(OFTEN)).unwrap();
    lab.ask(&["reload"]).unwrap();
    until("it is back in its pool", || is(&lab, B1, true));
    assert_eq!(answering(&lab), names([B1, B2]));
}

#[test]
fn a_reload_starts_anew_only_what_it_changes() {
    let (lab, [b1, _b2, _g1, _g2]) = healthy();
    b1.falls_ill();
    until("it is out of its pool", || is(&lab, B1, false));
    let since = |address| backend(&lab, address)["health"]["since"].clone();
    let near =
        |one: &Value, other: &Value| one.as_str().unwrap()[..19] == other.as_str().unwrap()[..19];
    let before = [since(B1), since(G1)];

    let other_drain =
        service(OFTEN).replace("[service.llm.blue]", "drain = \"1h\"\n[service.llm.blue]");
    lab.configure(&other_drain).unwrap();
    lab.ask(&["reload"]).unwrap();
    assert!(near(&since(B1), &before[0]) && near(&since(G1), &before[1]));
    assert!(is(&lab, B1, false));

    // Without probes everybody is in.
    let text = fs::read_to_string(lab.config()).unwrap();
    let unprobed = text.split("[service.llm.health]").next().unwrap();
    fs::write(lab.config(), unprobed).unwrap();
    let reload = lab.ask(&["reload"]).unwrap();
    assert_eq!(
        reload["changes"],
        serde_json::json!([
            "- llm health http each 200ms, timeout 2s, rise 2, fall 2, path /health"
        ])
    );
    assert_eq!(backend(&lab, B1)["health"], Value::Null);
    assert_eq!(backend(&lab, B1)["healthy"], true, "it can be reached");
    assert_eq!(answering(&lab), names([B1, B2]));
}

/// A release that turns out bad in its bake rolls back by itself, once, and says why.
#[test]
fn a_release_whose_servers_fall_in_its_bake_rolls_back_by_itself() {
    let (lab, servers) = healthy();
    let tables = "[[service.llm.gate]]\nname = \"smoke\"\nkind = \"http\"\npath = \"/health\"\n\
                  [service.llm.bake]\nduration = \"10m\"\nsettle = \"0s\"\n";
    lab.configure(&(service(OFTEN) + tables)).unwrap();
    lab.ask(&["reload"]).unwrap();
    let state = || lab.status().unwrap()["services"][0]["state"].clone();
    let (code, out, err) = std::thread::scope(|scope| {
        let release = scope.spawn(|| lab.tell(&["release", "start", "llm", "--wait"]).unwrap());
        until("it bakes", || state() == "BAKING");
        assert_eq!(lab.status().unwrap()["services"][0]["active"], "green");
        // One of two: what is left carries no more than half.
        servers[2].falls_ill();
        release.join().unwrap()
    });
    assert_eq!(code, 10, "{out}{err}");
    assert_eq!(state(), "ROLLED_BACK");
    assert_eq!(lab.status().unwrap()["services"][0]["active"], "blue");
    let status = lab.ask(&["release", "status", "llm"]).unwrap();
    let why = status["release"]["why"].as_str().unwrap();
    assert!(
        why.contains(&format!("green is ill: 1 of 2 have fallen: {G1} (")),
        "{why}"
    );

    // The next one finds an ill colour, and is not flipped.
    let (code, out, err) = lab.tell(&["release", "start", "llm", "--wait"]).unwrap();
    assert_eq!(code, 6, "{out}{err}");
    assert_eq!(lab.status().unwrap()["services"][0]["active"], "blue");
}

/// A daemon that was just started knows nothing of anybody's health: a release that is about
/// to flip waits for that.
#[test]
fn a_release_that_was_about_to_flip_flips_after_kill_9_when_its_colour_is_known_to_be_well() {
    let (mut lab, _servers) = healthy();
    let go = lab.directory().join("go");
    let script = format!("until test -e {}; do sleep 0.05; done", go.display());
    let tables = format!(
        "[[service.llm.gate]]\nname = \"smoke\"\nkind = \"http\"\npath = \"/health\"\n\
         [[service.llm.hook]]\nname = \"wait\"\nwhen = \"before-flip\"\nkind = \"exec\"\n\
         command = [\"/bin/sh\", \"-c\", \"{script}\"]\n[service.llm.bake]\nsettle = \"0s\"\n"
    );
    // So slow that a verdict is seconds away.
    lab.configure(&(service("5s") + &tables)).unwrap();
    lab.ask(&["reload"]).unwrap();
    until("green is known", || {
        is(&lab, G1, true) && is(&lab, G2, true)
    });
    lab.ask(&["release", "start", "llm"]).unwrap();
    let state = |lab: &Lab| lab.status().unwrap()["services"][0]["state"].clone();
    until("it is about to flip", || state(&lab) == "SWITCHING");
    lab.end_daemon(Signal::SIGKILL).unwrap();
    std::fs::write(&go, "").unwrap();
    lab.start().unwrap();
    until("it has flipped", || state(&lab) == "BAKING");
    let status = lab.ask(&["release", "status", "llm"]).unwrap();
    let notes = status["release"]["notes"].to_string();
    assert!(
        notes.contains("nothing is known of green's health yet"),
        "{notes}"
    );
}

/// The old colour is what a rollback needs: nobody may take it down in an incident.
#[test]
fn the_old_colour_is_held_while_the_new_one_is_ill_or_unknown() {
    let (mut lab, servers) = healthy();
    let tables = "[[service.llm.gate]]\nname = \"smoke\"\nkind = \"http\"\npath = \"/health\"\n\
                  [service.llm.bake]\nduration = \"3s\"\nsettle = \"0s\"\n";
    lab.configure(&(service(OFTEN) + tables)).unwrap();
    lab.ask(&["reload"]).unwrap();
    let (code, out, err) = lab.tell(&["release", "start", "llm", "--wait"]).unwrap();
    assert_eq!(code, 0, "{out}{err}");
    let state = |lab: &Lab| lab.status().unwrap()["services"][0]["state"].clone();
    assert_eq!(state(&lab), "STANDBY");

    let ill = &servers[2..];
    ill.iter().for_each(Server::falls_ill);
    until("green is ill", || all_down(&lab, "green"));
    let retire = ["standby", "retire", "llm"];
    let refused = |lab: &Lab| {
        let (code, out, err) = lab.tell(&retire).unwrap();
        (code == 5 && err.contains("blue must stay up"))
            .then_some(err.clone())
            .ok_or(out + &err)
    };
    until("the release hears of it", || {
        refused(&lab).unwrap().contains("green is ill: ")
    });
    // Nor by a daemon that knows nothing yet: probes of ill servers may take their time.
    lab.end_daemon(Signal::SIGKILL).unwrap();
    lab.start().unwrap();
    for _ in 0..20 {
        refused(&lab).unwrap();
    }
    until("the release hears of it again", || {
        refused(&lab).unwrap().contains("green is ill: ")
    });
    assert_eq!(state(&lab), "STANDBY");
    let forced = lab.ask(&[&retire[..], &["--force"]].concat()).unwrap();
    assert_eq!(forced["state"], "STEADY");
    let why = forced["release"]["why"].as_str().unwrap();
    assert!(why.contains("forced: green is ill: "), "{why}");
}

#[test]
fn a_release_to_an_ill_colour_ends_without_a_flip_unless_forced() {
    let (lab, servers) = healthy();
    let tables = "[[service.llm.gate]]\nname = \"blind\"\nkind = \"exec\"\n\
                  command = [\"/bin/true\"]\n[service.llm.bake]\nduration = \"0s\"\nsettle = \"0s\"\n";
    lab.configure(&(service(OFTEN) + tables)).unwrap();
    lab.ask(&["reload"]).unwrap();
    servers[2..].iter().for_each(Server::falls_ill);
    until("green is ill", || all_down(&lab, "green"));
    let start = ["release", "start", "llm", "--wait"];
    let (code, out, err) = lab.tell(&start).unwrap();
    assert_eq!(code, 8, "{out}{err}");
    assert!(err.contains("ABORTED: it was not flipped: "), "{err}");
    let active = || lab.status().unwrap()["services"][0]["active"].clone();
    assert_eq!(active(), "blue");

    let (code, out, err) = lab.tell(&[&start[..], &["--force"]].concat()).unwrap();
    assert_eq!((code, active()), (0, "green".into()), "{out}{err}");
    let history = lab.ask(&["history", "llm"]).unwrap();
    let mut entries = history["entries"].as_array().unwrap().iter();
    let is_forced = |entry: &Value| {
        let detail = entry["detail"].as_str().unwrap();
        entry["action"] == "flip" && detail.contains("forced: no backend of green is known")
    };
    assert!(entries.any(is_forced), "{history}");
}
