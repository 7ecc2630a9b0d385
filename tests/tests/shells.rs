//! What shells and man(1) are given: it loads, and knows every command.

use std::process::{Command, Stdio};

use bg_tests::lab::binary;

fn run(words: &[&str]) -> String {
    let output = Command::new(binary().unwrap())
        .args(words)
        .output()
        .unwrap();
    assert!(output.status.success(), "{words:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Every command, as `--help` has it.
fn commands() -> Vec<String> {
    let help = run(&["--help"]);
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let lines = lines.take_while(|line| !line.is_empty());
    let names = lines.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    names
        .filter(|name| !name.is_empty() && *name != "help")
        .map(str::to_owned)
        .collect()
}

#[test]
fn bash_completes_commands_and_options() {
    assert!(commands().len() > 15);
    let script = "source <(\"$0\" completions bash)\n\
        complete -p bgswitch > /dev/null || exit 9\n\
        try() { COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); \
        \"$(complete -p bgswitch | sed 's/.*-F \\([^ ]*\\).*/\\1/')\" bgswitch \"${!#}\" \"\"; \
        echo \"${COMPREPLY[@]}\"; }\n\
        try bgswitch ''\ntry bgswitch flip --m\ntry bgswitch history --si\n";
    let output = Command::new("bash")
        .args(["--norc", "-c", script])
        .arg(binary().unwrap())
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success());
    let told = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = told.lines().collect();
    for command in commands() {
        assert!(
            lines[0].split(' ').any(|word| word == command),
            "{command}: {told}"
        );
    }
    assert!(
        lines[1].contains("--mode") && lines[1].contains("--message"),
        "{told}"
    );
    assert_eq!(lines[2], "--since", "{told}");
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        assert!(run(&["completions", shell]).contains("rollback"), "{shell}");
    }
}

#[test]
fn the_manual_page_has_every_command_and_only_requests_that_roff_knows() {
    let page = run(&["man"]);
    assert!(
        page.contains(".TH bgswitch 8") || page.contains(".TH BGSWITCH 8"),
        "{page}"
    );
    for command in commands() {
        let head = format!("\n.SH \"BGSWITCH {}\"\n", command.to_uppercase());
        assert!(page.contains(&head), "{head}");
    }
    for nested in ["RELEASE START", "STANDBY EXTEND"] {
        assert!(
            page.contains(&format!("\n.SH \"BGSWITCH {nested}\"\n")),
            "{nested}"
        );
    }
    let known = [
        "TH", "SH", "SS", "PP", "TP", "RS", "RE", "br", "IP", "nf", "fi", "ie", "el", "ds",
    ];
    for line in page.lines().filter(|line| line.starts_with('.')) {
        let request = line[1..].split([' ', '\\']).next().unwrap();
        assert!(known.contains(&request), "{line}");
    }
    assert!(page.contains("Exit codes") && page.contains("\\-\\-if\\-generation"));
}
