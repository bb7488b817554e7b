//! From words to conditions.

use std::net::IpAddr;
use std::str::FromStr;

use super::{FilterError, Node, Protocol, Side, WORDS_MAX};

const PRIMITIVE: &str = "arp, ip, ip6, tcp, udp, sctp, icmp, icmp6, vlan, ether, host, net, \
                         port, src, dst, less, greater, not, ( or an IP address";
const ADDRESS: &str = "an IP address as 10.0.0.1 or fe80::1";
const NET: &str = "a network as 10.0.0.0/8 or fe80::/10";
const PORT: &str = "a port number from 0 to 65535";
const MAC: &str = "a MAC address as 02:00:00:00:00:01";
const VLAN: &str = "a VLAN number from 0 to 4095";
const LENGTH: &str = "a number of bytes";
const ETHER: &str = "src, dst, host, broadcast, multicast, proto or a MAC address";
const TYPE: &str = "an EtherType as 0x0806";
const SIDE: &str = "host, net, port or an IP address";
const BETWEEN: &str = "and, or, ) or the end";
const CLOSE: &str = "and, or, or the ) that closes a (";

/// A word and where it begins.
#[derive(Debug, Clone, Copy)]
struct Word<'a> {
    text: &'a str,
    /// In bytes from the begin, and in characters from 1 on.
    at: usize,
    column: usize,
}

/// Reads a filter; none if it is empty.
pub(super) fn parse(text: &str) -> Result<Option<Node>, FilterError> {
    let words = split(text);
    if words.is_empty() {
        return Ok(None);
    }
    if words.len() > WORDS_MAX {
        let what = format!("a filter of {} words", words.len());
        return Err(FilterError { what, at: None, expected: "at most 256 words" });
    }
    let mut parser = Parser { words: &words, at: 0 };
    let node = parser.filter()?;
    match parser.peek() {
        None => Ok(Some(node)),
        Some(_) => Err(parser.wrong(BETWEEN)),
    }
}

/// Words end at blanks; operators end them too, and a parenthesis or `!` stands for itself.
fn split(text: &str) -> Vec<Word<'_>> {
    let class = |letter: char| match letter {
        '(' | ')' | '!' => Class::Alone,
        '&' | '|' => Class::Operator,
        _ if letter.is_whitespace() => Class::Blank,
        _ => Class::Letter,
    };
    let mut words: Vec<Word<'_>> = Vec::new();
    let mut before = Class::Blank;
    for (index, (at, letter)) in text.char_indices().enumerate() {
        let class = class(letter);
        let end = at.saturating_add(letter.len_utf8());
        let goes_on = class == before && class != Class::Alone;
        match words.last_mut() {
            _ if class == Class::Blank => {}
            Some(word) if goes_on => word.text = text.get(word.at..end).unwrap_or_default(),
            _ => words.push(Word {
                text: text.get(at..end).unwrap_or_default(),
                at,
                column: index.saturating_add(1),
            }),
        }
        before = class;
    }
    words
}

/// What a letter is to words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Blank,
    Letter,
    Operator,
    Alone,
}

struct Parser<'a> {
    words: &'a [Word<'a>],
    at: usize,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<&'a str> {
        self.words.get(self.at).map(|word| word.text)
    }

    /// Takes the next word if it is one of these.
    fn take(&mut self, wanted: &[&str]) -> bool {
        let found = self.peek().is_some_and(|word| wanted.contains(&word));
        self.at = self.at.saturating_add(usize::from(found));
        found
    }

    /// The next word is wrong.
    fn wrong(&self, expected: &'static str) -> FilterError {
        match self.words.get(self.at) {
            Some(word) => FilterError {
                what: format!("{:?} is not understood", word.text),
                at: Some((self.at.saturating_add(1), word.column)),
                expected,
            },
            None => {
                FilterError { what: "the filter ends too early".to_owned(), at: None, expected }
            }
        }
    }

    /// Reads the next word as a value.
    fn value<T>(
        &mut self,
        read: impl Fn(&str) -> Option<T>,
        expected: &'static str,
    ) -> Result<T, FilterError> {
        match self.peek().and_then(read) {
            Some(value) => {
                self.at = self.at.saturating_add(1);
                Ok(value)
            }
            None => Err(self.wrong(expected)),
        }
    }

    fn filter(&mut self) -> Result<Node, FilterError> {
        let mut left = self.part()?;
        loop {
            if self.take(&["and", "&&"]) {
                left = Node::And(Box::new(left), Box::new(self.part()?));
            } else if self.take(&["or", "||"]) {
                left = Node::Or(Box::new(left), Box::new(self.part()?));
            } else {
                return Ok(left);
            }
        }
    }

    fn part(&mut self) -> Result<Node, FilterError> {
        if self.take(&["not", "!"]) {
            return Ok(Node::Not(Box::new(self.part()?)));
        }
        if self.take(&["("]) {
            let inner = self.filter()?;
            return if self.take(&[")"]) { Ok(inner) } else { Err(self.wrong(CLOSE)) };
        }
        self.primitive()
    }

    fn primitive(&mut self) -> Result<Node, FilterError> {
        if self.take(&["ether"]) {
            return self.ether();
        }
        if self.take(&["vlan"]) {
            let number = self.peek().is_some_and(|word| word.starts_with(digit));
            let read = |word: &str| word.parse().ok().filter(|number| *number < 4096);
            return Ok(Node::Vlan(if number { Some(self.value(read, VLAN)?) } else { None }));
        }
        if self.take(&["less"]) {
            return Ok(Node::Less(self.value(|word| word.parse().ok(), LENGTH)?));
        }
        if self.take(&["greater"]) {
            return Ok(Node::Greater(self.value(|word| word.parse().ok(), LENGTH)?));
        }
        let protocol = self.protocol();
        match (protocol, self.sided()?) {
            (None, None) => Err(self.wrong(PRIMITIVE)),
            (None, Some(node)) => Ok(node),
            (Some(protocol), None) => Ok(Node::Protocol(protocol)),
            (Some(protocol), Some(node)) => {
                Ok(Node::And(Box::new(Node::Protocol(protocol)), Box::new(node)))
            }
        }
    }

    fn protocol(&mut self) -> Option<Protocol> {
        let protocol = match self.peek()? {
            "arp" => Protocol::Arp,
            "ip" => Protocol::Ip,
            "ip6" => Protocol::Ip6,
            "tcp" => Protocol::Over(6),
            "udp" => Protocol::Over(17),
            "sctp" => Protocol::Over(132),
            "icmp" => Protocol::OverIp(1),
            "icmp6" => Protocol::OverIp6(58),
            _ => return None,
        };
        self.at = self.at.saturating_add(1);
        Some(protocol)
    }

    /// What has a source and a destination: none if the next word does not begin it.
    fn sided(&mut self) -> Result<Option<Node>, FilterError> {
        let side = self.side();
        if self.take(&["port"]) {
            let port = self.value(|word| word.parse().ok(), PORT)?;
            return Ok(Some(Node::Port(side.unwrap_or(Side::Any), port)));
        }
        if self.take(&["net"]) {
            let (address, bits) = self.value(net, NET)?;
            return Ok(Some(Node::Net(side.unwrap_or(Side::Any), address, bits)));
        }
        let host = self.take(&["host"]);
        if !host && side.is_none() && self.peek().is_none_or(|word| address(word).is_none()) {
            return Ok(None);
        }
        let address = self.value(address, if host { ADDRESS } else { SIDE })?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        Ok(Some(Node::Net(side.unwrap_or(Side::Any), address, bits)))
    }

    fn side(&mut self) -> Option<Side> {
        if self.take(&["src"]) {
            return Some(Side::Source);
        }
        self.take(&["dst"]).then_some(Side::Destination)
    }

    fn ether(&mut self) -> Result<Node, FilterError> {
        if self.take(&["broadcast"]) {
            return Ok(Node::Broadcast);
        }
        if self.take(&["multicast"]) {
            return Ok(Node::Multicast);
        }
        if self.take(&["proto"]) {
            return Ok(Node::EtherType(self.value(ether_type, TYPE)?));
        }
        let side = self.side();
        let host = self.take(&["host"]);
        let expected = if host || side.is_some() { MAC } else { ETHER };
        let mac = self.value(mac, expected)?;
        Ok(Node::Ether(side.unwrap_or(Side::Any), mac))
    }
}

fn digit(letter: char) -> bool {
    letter.is_ascii_digit()
}

fn address(word: &str) -> Option<IpAddr> {
    IpAddr::from_str(word).ok()
}

fn net(word: &str) -> Option<(IpAddr, u8)> {
    let (address, bits) = word.split_once('/')?;
    let address = IpAddr::from_str(address).ok()?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let bits = bits.parse().ok().filter(|bits| *bits <= most)?;
    Some((address, bits))
}

fn ether_type(word: &str) -> Option<u16> {
    match word.strip_prefix("0x") {
        Some(hex) => u16::from_str_radix(hex, 16).ok(),
        None => word.parse().ok(),
    }
}

fn mac(word: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = word.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| matches!(part.len(), 1 | 2))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}
