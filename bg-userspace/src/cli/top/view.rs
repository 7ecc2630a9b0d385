//! The screen: drawn anew from what the API told, at whatever size there is.

use std::fmt::Write as _;

use ratatui::{
    Frame, Terminal,
    backend::TestBackend,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style, Stylize as _},
    text::{Line, Span},
    widgets::{Cell, Paragraph, Row, Table, TableState},
};

use super::model::{Screen, sum};
use crate::{
    api::{BackendStatus, ColourStatus, ServiceStatus},
    cli::text::{count, flows, length, measured, percent},
    journal::Entry,
    release::State,
    time,
};

/// Columns of a frame that is printed.
const WIDTH: u16 = 140;
/// Lines that the events get at least, their heading included.
const EVENTS: u16 = 4;

/// Draws everything.
pub(super) fn draw(frame: &mut Frame<'_>, screen: &Screen) {
    let services = screen.now().status.services.len() as u16 + 1;
    let detail = screen
        .chosen()
        .map_or_else(Vec::new, |chosen| detail(screen, chosen));
    let [head, list, _, whole, reasons, events, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Max(services),
        Constraint::Length(1),
        Constraint::Max(detail.len() as u16 + 1),
        Constraint::Length(1),
        Constraint::Min(EVENTS),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(Paragraph::new(title(screen)), head);
    services_table(frame, list, screen);
    frame.render_widget(Paragraph::new(detail), whole);
    frame.render_widget(Paragraph::new(reasons_line(screen)), reasons);
    let lines = journal(&screen.now().journal, events.height.saturating_sub(1));
    frame.render_widget(Paragraph::new(lines), events);
    let sort = screen.sort.as_str();
    let help = format!("up/down service   s sort (by {sort})   q quit");
    frame.render_widget(Paragraph::new(help.dark_gray()), keys);
}

/// One frame as text.
pub(super) fn text(screen: &Screen) -> String {
    let detail = screen
        .chosen()
        .map_or(0, |chosen| detail(screen, chosen).len());
    let height = screen.now().status.services.len() + detail + 12;
    let backend = TestBackend::new(WIDTH, height as u16);
    let Ok(mut terminal) = Terminal::new(backend);
    let Ok(_) = terminal.draw(|frame| draw(frame, screen));
    let buffer = terminal.backend().buffer();
    let mut lines: Vec<String> = buffer
        .content()
        .chunks(usize::from(WIDTH))
        .map(|cells| cells.iter().map(ratatui::buffer::Cell::symbol).collect())
        .map(|line: String| line.trim_end().to_owned())
        .collect();
    // The keys are for who has some.
    lines.pop();
    while lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    lines.join("\n") + "\n"
}

fn title(screen: &Screen) -> Line<'static> {
    if let Some(trouble) = &screen.trouble {
        return Line::from(trouble.clone()).fg(Color::Red).bold();
    }
    let status = &screen.now().status;
    let interfaces: Vec<String> = status
        .interfaces
        .iter()
        .map(
            |interface| match (interface.program_id, interface.running) {
                (0, _) => format!("{} ABSENT", interface.name),
                (_, false) => format!("{} DOWN", interface.name),
                (_, true) => format!("{} {}", interface.name, interface.mode),
            },
        )
        .collect();
    let table = &status.flow_table;
    Line::from(format!(
        "bgswitch {}  up {}  {}  flow table {} of {}",
        status.daemon.version,
        length(status.daemon.uptime_s),
        interfaces.join(", "),
        count(table.entries),
        count(table.capacity)
    ))
    .bold()
}

fn services_table(frame: &mut Frame<'_>, area: Rect, screen: &Screen) {
    let services = screen.services();
    let head = [
        "SERVICE",
        "ACTIVE",
        "GEN",
        "CANARY",
        "STATE",
        "NEW/S",
        "PACKETS/S",
        "FLOWS",
        "NEXT",
    ];
    let rows = services.iter().map(|service| {
        let canary = match service.canary_percent {
            0.0 => String::new(),
            share => format!("{} %", percent(share)),
        };
        Row::new([
            Cell::from(service.name.clone()),
            Cell::from(painted(&service.active)),
            Cell::from(service.generation.to_string()),
            Cell::from(canary),
            Cell::from(state(service)),
            Cell::from(rate(screen.rate(service, |colour| colour.new_flows))),
            Cell::from(rate(screen.rate(service, |colour| colour.packets))),
            Cell::from(count(sum(service, |colour| colour.flows))),
            Cell::from(next(screen, service)),
        ])
    });
    let widths = [
        Constraint::Length(16),
        Constraint::Length(6),
        Constraint::Length(5),
        Constraint::Length(8),
        Constraint::Length(11),
        Constraint::Length(9),
        Constraint::Length(11),
        Constraint::Length(9),
        Constraint::Min(20),
    ];
    let chosen = screen.chosen().map(|chosen| &chosen.name);
    let at = services
        .iter()
        .position(|service| Some(&service.name) == chosen);
    let mut shown = TableState::default().with_selected(at);
    let head = Row::new(head.map(Cell::from)).style(Style::new().fg(Color::DarkGray));
    let table = Table::new(rows, widths)
        .header(head)
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    frame.render_stateful_widget(table, area, &mut shown);
}

/// The state of the release, or of a drain where there is none.
fn state(service: &ServiceStatus) -> Span<'static> {
    let drains = |colour: &ColourStatus| colour.draining_flows + colour.resetting_flows > 0;
    let state = service.state.clone();
    match state.as_str() {
        "STEADY" if service.colours.values().any(drains) => "draining".fg(Color::Yellow),
        "STEADY" => Span::from(state),
        "FAILED" | "ROLLED_BACK" | "ABORTED" => state.fg(Color::Red),
        _ => state.fg(Color::Yellow),
    }
}

/// What happens next, and when.
fn next(screen: &Screen, service: &ServiceStatus) -> String {
    let release = screen.now().releases.get(&service.name);
    if let Some(release) = release.filter(|release| !release.over) {
        let until = release.until.as_ref();
        let until = until.map_or_else(String::new, |at| format!(" at {}", time::local(at)));
        return format!("{}{until}", release.next);
    }
    let drain = service.colours.iter().find_map(|(name, colour)| {
        let at = colour
            .draining_until
            .as_ref()
            .filter(|_| colour.draining_flows > 0)?;
        let left = flows(colour.draining_flows);
        Some(format!("{left} of {name} reset at {}", time::local(at)))
    });
    drain.unwrap_or_default()
}

/// Everything of one service.
fn detail(screen: &Screen, service: &ServiceStatus) -> Vec<Line<'static>> {
    let mut lines = vec![heading(&format!(
        "{}  {}",
        service.name,
        service.listeners.join(" ")
    ))];
    let release = screen.now().releases.get(&service.name);
    if let Some(release) = release.filter(|_| service.state != State::Steady.as_str()) {
        let progress = release.progress.as_deref().unwrap_or_default();
        lines.push(Line::from(format!(
            "  {} {}: {} {progress}",
            release.id, service.state, release.why
        )));
    }
    for (name, colour) in &service.colours {
        lines.push(colour_line(screen, service, name, colour));
        for backend in &colour.backends {
            lines.push(backend_line(backend));
        }
    }
    lines
}

fn colour_line(
    screen: &Screen,
    service: &ServiceStatus,
    name: &str,
    colour: &ColourStatus,
) -> Line<'static> {
    let role = if service.active == name {
        "active"
    } else {
        "standby"
    };
    let new = screen.colour_rate(service, name, |colour| colour.new_flows);
    let packets = screen.colour_rate(service, name, |colour| colour.packets);
    let mut text = format!(
        " {role:<8} {:<14} {:>9}  new {}/s  packets {}/s",
        colour.version.as_deref().unwrap_or("-"),
        flows(colour.flows),
        rate(new),
        rate(packets)
    );
    if let Some(heard) = screen.heard(service, name) {
        let _ = write!(
            text,
            "  refused {}/s  reset {}/s  5xx {} of {}/s",
            rate(heard.refused),
            rate(heard.reset),
            rate(heard.failed),
            rate(heard.answers)
        );
        let p90 = colour
            .signals
            .as_ref()
            .and_then(|heard| heard.answer.p90_us);
        if let Some(p90) = p90 {
            let _ = write!(text, "  p90 {}", measured(p90 * 1000));
        }
    }
    let all_down = if colour.all_down { "  ALL DOWN" } else { "" };
    Line::from(vec![
        Span::from("  "),
        painted(name),
        Span::from(text),
        all_down.fg(Color::Red),
    ])
}

fn backend_line(backend: &BackendStatus) -> Line<'static> {
    let (word, colour) = match (backend.healthy, backend.reachable) {
        (_, false) => ("no next hop", Color::Red),
        (Some(true), _) => ("healthy", Color::Green),
        (Some(false), _) => ("UNHEALTHY", Color::Red),
        (None, _) => ("not known yet", Color::Yellow),
    };
    let out = if backend.in_pool {
        ""
    } else {
        "  gets no new flows"
    };
    let why = backend
        .health
        .as_ref()
        .and_then(|health| health.why.as_ref());
    let why = why.map_or_else(String::new, |why| format!("  {why}"));
    Line::from(vec![
        Span::from(format!(
            "        {:<28} {:>9}  ",
            backend.address,
            flows(backend.flows)
        )),
        word.fg(colour),
        Span::from(format!("{out}{why}")),
    ])
}

fn reasons_line(screen: &Screen) -> Line<'static> {
    let reasons = screen.reasons();
    let reasons = reasons
        .iter()
        .map(|(reason, each)| format!("{reason} {}/s", rate(*each)));
    let reasons: Vec<String> = reasons.collect();
    let text = if reasons.is_empty() {
        "nothing".to_owned()
    } else {
        reasons.join("  ")
    };
    Line::from(vec![
        "not forwarded  ".fg(Color::DarkGray),
        Span::from(text),
    ])
}

/// The newest entries, the last one below.
fn journal(entries: &[Entry], room: u16) -> Vec<Line<'static>> {
    let results = entries.iter().filter(|entry| entry.phase != "intent");
    let mut newest: Vec<&Entry> = results.rev().take(usize::from(room)).collect();
    newest.reverse();
    let mut lines = vec![heading("last events")];
    lines.extend(newest.into_iter().map(|entry| {
        let why = entry.why.as_ref();
        let why = why.map_or_else(String::new, |why| format!("  ({why})"));
        Line::from(format!(
            "  {}  {:<12} {:<14} {:<12} {}{why}",
            time::local(&entry.time),
            entry.service,
            entry.action,
            entry.actor,
            entry.detail
        ))
    }));
    lines
}

fn heading(text: &str) -> Line<'static> {
    Line::from(text.to_owned()).fg(Color::DarkGray)
}

fn painted(colour: &str) -> Span<'static> {
    let text = format!("{colour:<5}");
    match colour {
        "blue" => text.fg(Color::Blue).bold(),
        _ => text.fg(Color::Green).bold(),
    }
}

/// A figure a second: `0`, `0.5`, `12`, `1 234`.
fn rate(rate: f64) -> String {
    if rate > 0.0 && rate < 9.95 {
        return format!("{rate:.1}");
    }
    count(rate.round() as u64)
}
