//! As much HTTP as a scraper needs: one request, without a body.

/// The longest request, with its header fields.
pub const REQUEST_MAX: usize = 8 * 1024;

/// Why a request gets nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It is no HTTP/1 request.
    Malformed,
    /// There is only `/metrics`.
    Unknown,
    /// There is only `GET`.
    Method,
    /// It is longer than [`REQUEST_MAX`].
    Long,
}

impl Refusal {
    pub(super) fn response(self) -> String {
        let (status, text) = match self {
            Self::Malformed => ("400 Bad Request", "not an HTTP/1 request\n"),
            Self::Unknown => ("404 Not Found", "there is only /metrics\n"),
            Self::Method => ("405 Method Not Allowed\r\nAllow: GET", "there is only GET\n"),
            Self::Long => ("431 Request Header Fields Too Large", "the request is too long\n"),
        };
        response(status, "text/plain; charset=utf-8", text)
    }
}

/// A whole response. It ends the connection.
pub(super) fn response(status: &str, content_type: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )
}

/// Whether the metrics are asked for; none while the request is not complete.
pub(super) fn parse(input: &[u8]) -> Option<Result<(), Refusal>> {
    let end = |mark: &[u8]| input.windows(mark.len()).position(|part| part == mark);
    let head = [end(b"\r\n\r\n"), end(b"\n\n")].into_iter().flatten().min();
    match head {
        Some(end) if end <= REQUEST_MAX => Some(request(input.get(..end).unwrap_or_default())),
        None if input.len() <= REQUEST_MAX => None,
        _ => Some(Err(Refusal::Long)),
    }
}

fn request(head: &[u8]) -> Result<(), Refusal> {
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = str::from_utf8(line.trim_ascii_end()).map_err(|_| Refusal::Malformed)?;
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(Refusal::Malformed);
    };
    let token = !method.is_empty() && method.bytes().all(|byte| byte.is_ascii_alphabetic());
    if !token || !version.starts_with("HTTP/1.") {
        return Err(Refusal::Malformed);
    }
    if method != "GET" {
        return Err(Refusal::Method);
    }
    // A scraper may be configured with parameters.
    let path = target.split_once('?').map_or(target, |(path, _)| path);
    if path == "/metrics" { Ok(()) } else { Err(Refusal::Unknown) }
}

#[cfg(test)]
mod tests {
    use super::{REQUEST_MAX, Refusal, parse, response};

    type Case<'a> = (&'a [u8], Option<Result<(), Refusal>>);

    #[test]
    fn only_one_request_gets_the_metrics() {
        let cases: [Case<'_>; 17] = [
            (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", Some(Ok(()))),
            (b"GET /metrics HTTP/1.0\r\n\r\n", Some(Ok(()))),
            (b"GET /metrics?x=y HTTP/1.1\n\n", Some(Ok(()))),
            (b"GET /metrics HTTP/1.1\r\nHost: x\r\n", None),
            (b"", None),
            (b"GET / HTTP/1.1\r\n\r\n", Some(Err(Refusal::Unknown))),
            (b"GET /metrics/ HTTP/1.1\r\n\r\n", Some(Err(Refusal::Unknown))),
            (b"GET /metrics/../../etc/passwd HTTP/1.1\r\n\r\n", Some(Err(Refusal::Unknown))),
            (b"POST /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\n", Some(Err(Refusal::Method))),
            (b"HEAD /metrics HTTP/1.1\r\n\r\n", Some(Err(Refusal::Method))),
            (b"get /metrics HTTP/1.1\r\n\r\n", Some(Err(Refusal::Method))),
            (b"PRI * HTTP/2.0\r\n\r\n", Some(Err(Refusal::Malformed))),
            (b"GET /metrics\r\n\r\n", Some(Err(Refusal::Malformed))),
            (b"GET  /metrics HTTP/1.1\r\n\r\n", Some(Err(Refusal::Malformed))),
            (b"\r\n\r\n", Some(Err(Refusal::Malformed))),
            (b"\xff\xfe /metrics HTTP/1.1\r\n\r\n", Some(Err(Refusal::Malformed))),
            (b"\x16\x03\x01\x02\x00\n\n", Some(Err(Refusal::Malformed))),
        ];
        for (input, result) in cases {
            assert_eq!(parse(input), result, "{}", String::from_utf8_lossy(input));
        }
    }

    #[test]
    fn a_long_request_is_refused_as_soon_as_it_is_too_long() {
        let mut input = b"GET /metrics HTTP/1.1\r\nX: ".to_vec();
        input.resize(REQUEST_MAX, b'a');
        assert_eq!(parse(&input), None);
        input.push(b'a');
        assert_eq!(parse(&input), Some(Err(Refusal::Long)));
        input.extend_from_slice(b"\r\n\r\n");
        assert_eq!(parse(&input), Some(Err(Refusal::Long)));
    }

    #[test]
    fn responses_say_their_length() {
        let text = response("200 OK", "text/plain", "äb\n");
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("\r\n\r\näb\n"));
        assert!(text.contains("\r\nContent-Length: 4\r\n"));
        assert!(Refusal::Method.response().contains("\r\nAllow: GET\r\n"));
    }
}
