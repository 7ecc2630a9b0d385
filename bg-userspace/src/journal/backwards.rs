//! A file's lines from the last one to the first, without more of it in memory than a
//! block and a line.

use std::{fs::File, io, ops::ControlFlow, os::unix::fs::FileExt as _};

/// What is read at once, bytes.
const BLOCK: u64 = 64 << 10;
/// A longer line is none of ours: a request's body, and with it the operator's words,
/// has 2 MiB at most, which JSON may write in six times as many.
const MAX_LINE: usize = 16 << 20;

/// Gives `take` the lines that the file has now, the last one first, until it has enough.
pub(super) fn lines(
    file: &File,
    take: &mut impl FnMut(&[u8]) -> ControlFlow<()>,
) -> io::Result<ControlFlow<()>> {
    let mut end = file.metadata()?.len();
    // The end of the line whose begin was not read yet, and whether it is too long.
    let mut rest: Vec<u8> = Vec::new();
    let mut skipped = false;
    while end > 0 {
        let start = end.saturating_sub(BLOCK);
        let mut block = vec![0; (end - start) as usize];
        file.read_exact_at(&mut block, start)?;
        end = start;
        while let Some(feed) = block.iter().rposition(|byte| *byte == b'\n') {
            let mut line = block.split_off(feed + 1);
            block.truncate(feed);
            line.append(&mut rest);
            if !std::mem::take(&mut skipped) && !line.is_empty() && take(&line).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        block.append(&mut rest);
        rest = block;
        if rest.len() > MAX_LINE {
            rest = Vec::new();
            skipped = true;
        }
    }
    if skipped || rest.is_empty() {
        return Ok(ControlFlow::Continue(()));
    }
    Ok(take(&rest))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn every_line_comes_once_wherever_blocks_end() {
        let name = format!("bgswitch-backwards-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let block = BLOCK as usize;
        for lengths in [
            vec![],
            vec![0, 0],
            vec![block - 1, block, block + 1],
            vec![3, 2 * block, 1, 5 * block + 7, 0, 4],
            vec![5, MAX_LINE + 2 * block, 6],
        ] {
            let lines: Vec<String> = lengths.iter().map(|length| "x".repeat(*length)).collect();
            for end in ["", "\n"] {
                fs::write(&path, lines.join("\n") + end).unwrap();
                let mut found = Vec::new();
                let mut take = |line: &[u8]| {
                    found.push(line.len());
                    ControlFlow::Continue(())
                };
                let read = super::lines(&File::open(&path).unwrap(), &mut take).unwrap();
                assert!(read.is_continue());
                found.reverse();
                let told = lengths.iter().copied();
                let told: Vec<usize> = told.filter(|n| (1..=MAX_LINE).contains(n)).collect();
                assert_eq!(found, told);
            }
        }
        fs::remove_file(&path).unwrap();
    }
}
