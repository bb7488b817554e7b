//! A bar chart as SVG: one bar for each row, its spread as a whisker, groups of equal case and
//! regime.
//!
//! **Units** Pixels of the drawing, which scales.

use std::fmt::Write;

use super::summary::Row;

const WIDTH: f64 = 760.0;
/// Where the bars begin and how long the longest is; the value stands behind it.
const LEFT: f64 = 240.0;
const LONGEST: f64 = 400.0;
const TOP: f64 = 64.0;
const BAR: f64 = 16.0;
const STEP: f64 = 20.0;
const GROUP_GAP: f64 = 12.0;
const FOOTER: f64 = 48.0;

/// Draws the rows; `footer` says where the figures come from.
pub(crate) fn draw(title: &str, unit: &str, rows: &[Row], footer: &[String]) -> String {
    let largest = rows.iter().map(|row| row.value.max).fold(f64::MIN_POSITIVE, f64::max);
    let scale = LONGEST / largest;
    let mut body = String::new();
    let mut y = TOP;
    let mut last = None;
    for row in rows {
        let group = (&row.case, row.regime);
        if last != Some(group) {
            y += if last.is_some() { GROUP_GAP } else { 0.0 };
            let label = format!("{}, {}", row.case, row.regime.name());
            text(&mut body, (10.0, y + 12.0), "group", &label);
        }
        last = Some(group);
        bar(&mut body, y, scale, row);
        y += STEP;
    }
    for (line, at) in footer.iter().zip([y + 20.0, y + 36.0]) {
        text(&mut body, (10.0, at), "note", line);
    }
    let mut head = String::new();
    text(&mut head, (10.0, 24.0), "title", title);
    let how = format!("{unit}; median, whisker from least to most; ratio of causeway to it");
    text(&mut head, (10.0, 44.0), "note", &how);
    frame(y + FOOTER, &(head + &body))
}

fn frame(height: f64, body: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH:.0} {height:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <style>.title{{font-size:16px;font-weight:bold}}.group{{font-weight:bold}}\
         .note{{fill:#555;font-size:11px}}.subject{{text-anchor:end}}</style>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n{body}</svg>\n"
    )
}

fn bar(out: &mut String, y: f64, scale: f64, row: &Row) {
    let value = row.value;
    let (middle, least, most) = (y + BAR / 2.0, LEFT + value.min * scale, LEFT + value.max * scale);
    text(out, (LEFT - 8.0, y + 12.0), "subject", &row.subject);
    let length = value.median * scale;
    let colour = colour(&row.subject);
    let _ = writeln!(
        out,
        "<rect x=\"{LEFT:.1}\" y=\"{y:.1}\" width=\"{length:.1}\" height=\"{BAR:.1}\" \
         fill=\"{colour}\"/>"
    );
    let _ = writeln!(
        out,
        "<path d=\"M{least:.1} {middle:.1}H{most:.1}M{least:.1} {:.1}v6M{most:.1} {:.1}v6\" \
         stroke=\"#222\"/>",
        middle - 3.0,
        middle - 3.0
    );
    let ratio = row.ratio.map(|ratio| format!(" ({ratio:.2}x)")).unwrap_or_default();
    let label = format!("{:.2}{ratio}", value.median);
    text(out, (LEFT + value.max * scale + 8.0, y + 12.0), "value", &label);
}

fn text(out: &mut String, (x, y): (f64, f64), class: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\">{text}</text>");
}

fn colour(subject: &str) -> &'static str {
    if subject.starts_with("causeway") {
        "#2b7bba"
    } else if subject.starts_with("OVS") {
        "#e07b39"
    } else {
        "#9a9a9a"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::regime::Regime;
    use crate::bench::summary::spread;

    fn row(subject: &str, values: &[f64]) -> Row {
        Row {
            case: "64 B split".to_owned(),
            regime: Regime::Near,
            subject: subject.to_owned(),
            value: spread(values).unwrap(),
            cycles_per_frame: None,
            ratio: None,
        }
    }

    #[test]
    fn the_largest_value_is_the_longest_and_names_are_escaped() {
        let rows = [row("causeway", &[15.0]), row("OVS-DPDK", &[7.5])];
        let drawn = draw("a < b", "Mpps", &rows, &["origin".to_owned()]);
        assert!(drawn.contains("width=\"400.0\"") && drawn.contains("width=\"200.0\""), "{drawn}");
        assert!(drawn.contains("a &lt; b") && drawn.contains("origin"));
        // The group has one label, each bar its own.
        assert_eq!(drawn.matches("class=\"group\"").count(), 1);
        assert_eq!(drawn.matches("class=\"subject\"").count(), 2);
    }
}
