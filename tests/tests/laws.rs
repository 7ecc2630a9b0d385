//! The laws, with real TCP and UDP through a real gateway.

use std::{net::SocketAddr, time::Duration};

use bg_tests::{
    lab::{Lab, Place, SERVICE, SERVICE_V6},
    load::{self, Load, Reuse},
};

fn lab() -> Lab {
    let mut lab = Lab::new().unwrap();
    lab.configure_default().unwrap();
    for (place, colour) in [(Place::Blue, "blue"), (Place::Green, "green")] {
        load::serve(lab.enter(place).unwrap(), colour, &[8000, 8001], &[]).unwrap();
    }
    lab.start().unwrap();
    lab
}

#[test]
fn smoke() {
    let lab = lab();
    println!("{:?}", lab.tell(&["status"]).unwrap().1);
    let v4: SocketAddr = format!("{SERVICE}:8000").parse().unwrap();
    let v6: SocketAddr = format!("[{SERVICE_V6}]:8000").parse().unwrap();
    assert_eq!(
        load::once(lab.enter(Place::Client).unwrap(), v4).unwrap(),
        "blue"
    );
    assert_eq!(
        load::once(lab.enter(Place::Client).unwrap(), v6).unwrap(),
        "blue"
    );
    let clients = (0..64)
        .map(|n| {
            (
                if n % 2 == 0 { v4 } else { v6 },
                if n % 4 < 2 {
                    Reuse::KeepAlive
                } else {
                    Reuse::Never
                },
            )
        })
        .collect();
    let load = Load::start(
        lab.enter(Place::Client).unwrap(),
        clients,
        Duration::from_millis(5),
    );
    std::thread::sleep(Duration::from_millis(500));
    for _ in 0..4 {
        println!("{}", lab.tell(&["flip", "llm"]).unwrap().1);
        std::thread::sleep(Duration::from_millis(500));
    }
    println!("{}", lab.tell(&["status"]).unwrap().1);
    let answers = load.finish().unwrap();
    println!("{} answers", answers.len());
    for answer in answers.iter().filter(|a| a.result.is_err()).take(5) {
        println!("{answer:?}");
    }
}
