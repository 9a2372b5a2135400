//! What a person reads: tables, sizes, durations. Output goes through these functions and not through
//! `println!`, which panics when the reader of a pipe has had enough.

use std::io::{self, IsTerminal as _, Write as _};

use serde_json::Value;

/// One line, or several, on stdout.
pub fn line(text: &str) -> io::Result<()> {
    writeln!(io::stdout(), "{text}")
}

/// Text that comes in pieces, as it came.
pub fn bytes(piece: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(piece)?;
    stdout.flush()
}

/// A document of the API as it came.
pub fn json(value: &Value) -> io::Result<()> {
    line(&format!("{value:#}"))
}

/// A list of the API, all its pages as one.
pub fn json_list(items: Vec<Value>) -> io::Result<()> {
    json(&serde_json::json!({"data": items, "next_cursor": null}))
}

/// Columns as wide as their widest cell.
pub fn table<const N: usize>(headers: [&str; N], rows: &[[String; N]]) -> io::Result<()> {
    let mut widths = headers.map(|header| header.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let format_row = |cells: [&str; N]| {
        let cells: Vec<_> = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    line(&format_row(headers))?;
    rows.iter().try_for_each(|row| line(&format_row(row.each_ref().map(String::as_str))))
}

/// `17.3 MB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let exponent = (0..UNITS.len() - 1).find(|&e| bytes < 1000_u64.pow(e as u32 + 1)).unwrap_or(UNITS.len() - 1);
    match exponent {
        0 => format!("{bytes} B"),
        _ => format!("{:.1} {}", bytes as f64 / 1000_f64.powi(exponent as i32), UNITS[exponent]),
    }
}

/// `1h 02m`, `4m 09s`, `12s`.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m {s:02}s"),
        (h, m, _) => format!("{h}h {m:02}m"),
    }
}

/// A cell for a value that may not be there.
pub fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// Whether there is anybody to draw a bar for.
pub fn is_terminal() -> bool {
    io::stdout().is_terminal() && io::stderr().is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_a_unit_that_fits() {
        let sizes = [0, 999, 1000, 17_250_000, 1_000_000_000_000_000].map(size);
        assert_eq!(sizes, ["0 B", "999 B", "1.0 kB", "17.2 MB", "1000.0 TB"]);
    }

    #[test]
    fn durations_show_two_parts_at_most() {
        assert_eq!([12.4, 249.0, 3725.0].map(duration), ["12s", "4m 09s", "1h 02m"]);
    }
}
