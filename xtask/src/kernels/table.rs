//! The results, a line a kernel.

use anyhow::Result;

use super::machine::Report;

/// A kernel's name, and what was seen of it.
pub type Seen = (&'static str, Result<Report>);

/// The guest's checks, and what they are called in the table. One that is not in a
/// report has failed.
const CHECKS: [(&str, &str); 10] = [
    ("features", "features"),
    ("load", "loads"),
    ("virtio", "virtio-net"),
    ("veth", "veth"),
    ("large", "veth, large MTU"),
    ("cases", "packet cases"),
    ("flip", "flip"),
    ("large-cases", "large packet cases"),
    ("transfer", "large frames, TCP"),
    ("vlan", "VLAN device"),
];

/// The table, as in docs/kernels.md.
pub fn markdown(results: &[Seen]) -> String {
    let titles = CHECKS.map(|(_, title)| title).join(" | ");
    let mut text = format!(
        "| kernel | {titles} |\n|{}\n",
        " --- |".repeat(CHECKS.len() + 1)
    );
    for (name, seen) in results {
        let (kernel, cells) = match seen {
            Ok(report) => {
                let cells = CHECKS.map(|(check, _)| match report.checks.get(check) {
                    Some(Ok(found)) => found.clone(),
                    Some(Err(_)) => "FAILED".to_owned(),
                    None => "NOT SEEN".to_owned(),
                });
                (report.release.clone(), cells)
            }
            Err(_) => ((*name).to_owned(), CHECKS.map(|_| "NOT SEEN".to_owned())),
        };
        let cells = cells.join(" | ");
        text.extend(["| ", kernel.as_str(), " | ", cells.as_str(), " |\n"]);
    }
    text
}

/// Everything that was not seen to work, with its reason.
pub fn failures(results: &[Seen]) -> Vec<String> {
    let mut failures = Vec::new();
    for (name, seen) in results {
        let report = match seen {
            Ok(report) => report,
            Err(error) => {
                failures.push(format!("{name}: {error:#}"));
                continue;
            }
        };
        for (check, _) in CHECKS {
            match report.checks.get(check) {
                Some(Ok(_)) => {}
                Some(Err(why)) => failures.push(format!("{name}: {check}: {why}")),
                None => failures.push(format!("{name}: {check}: the guest did not say")),
            }
        }
    }
    failures
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn nothing_is_green_by_accident() {
        let report = |checks: &[(&str, Result<&str, &str>)]| Report {
            release: "5.10.0".to_owned(),
            checks: checks
                .iter()
                .map(|(name, found)| {
                    (
                        (*name).to_owned(),
                        found.map(str::to_owned).map_err(str::to_owned),
                    )
                })
                .collect::<BTreeMap<_, _>>(),
        };
        let all = CHECKS.map(|(check, _)| (check, Ok("fine")));
        assert_eq!(
            failures(&[("5.10", Ok(report(&all)))]),
            Vec::<String>::new()
        );
        assert_eq!(failures(&[("5.10", Ok(report(&all[1..])))]).len(), 1);
        let mut bad = all;
        bad[2].1 = Err("no");
        assert_eq!(
            failures(&[("5.10", Ok(report(&bad)))]),
            ["5.10: virtio: no"]
        );
        assert_eq!(
            failures(&[("5.10", Err(anyhow::anyhow!("hung")))]),
            ["5.10: hung"]
        );
    }
}
