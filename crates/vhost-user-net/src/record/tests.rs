use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::{Identity, Records, file_name, prepare_state_dir, remove_record};
use crate::memory::FilePlace;
use crate::session::RingIndex;
use virtq::mem::GuestPhysAddr;
use virtq::{Layout, QueueConfig, RingFeatures, RingPosition};

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        prepare_state_dir(&dir.path().join("state")).unwrap();
        Self { dir }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("guest.sock")
    }

    fn records(&self) -> Records {
        Records::new(Some(&self.state()), &self.socket(), 2)
    }

    fn file(&self) -> PathBuf {
        self.state().join(file_name(&self.socket()))
    }
}

fn identity(change: impl FnOnce(&mut QueueConfig, &mut [FilePlace; 3])) -> Identity {
    let mut config = QueueConfig {
        layout: Layout::Packed,
        size: 256,
        desc: GuestPhysAddr(0),
        driver: GuestPhysAddr(0),
        device: GuestPhysAddr(0),
        features: RingFeatures::default(),
        position: RingPosition::start(Layout::Packed),
    };
    let at = |offset| FilePlace { device: 1, inode: 2, offset };
    let mut places = [at(0), at(4096), at(8192)];
    change(&mut config, &mut places);
    Identity::new(&config, places)
}

fn leave(records: &mut Records, ring: u16, identity: &Identity) {
    let page = records.page(RingIndex(ring)).unwrap();
    Records::claim(&page, identity);
    page.leave(RingPosition::start(Layout::Packed));
}

fn knows(records: &mut Records, ring: u16, identity: &Identity) -> bool {
    Records::knows(&records.page(RingIndex(ring)).unwrap(), identity)
}

#[test]
fn a_record_is_of_one_ring_only() {
    let place = Place::new();
    let mut records = place.records();
    let mine = identity(|_, _| ());
    leave(&mut records, 1, &mine);
    assert!(knows(&mut records, 1, &mine));
    assert!(!knows(&mut records, 0, &mine), "of another ring of the port");
    let others = [
        identity(|config, _| config.size = 128),
        identity(|config, _| config.layout = Layout::Split),
        identity(|config, _| config.features.in_order = true),
        identity(|config, _| config.features.event_idx = true),
        identity(|_, places| places[0].inode = 3),
        identity(|_, places| places[0].device = 3),
        identity(|_, places| places[0].offset = 16),
        identity(|_, places| places[1].offset = 16),
        identity(|_, places| places[1].inode = 3),
        identity(|_, places| places[2].offset = 16),
        identity(|_, places| places[2].device = 3),
    ];
    for other in &others {
        assert!(!knows(&mut records, 1, other), "{other:?}");
    }
    Records::claim(&records.page(RingIndex(1)).unwrap(), &mine);
    assert!(knows(&mut records, 1, &mine), "claiming what is one's own changes nothing");
    Records::claim(&records.page(RingIndex(1)).unwrap(), &others[0]);
    assert!(!knows(&mut records, 1, &others[0]), "whose place was another's");
}

#[test]
fn a_file_outlives_its_process_and_has_one_owner() {
    let place = Place::new();
    let mine = identity(|_, _| ());
    let mut first = place.records();
    assert!(first.outlive());
    leave(&mut first, 3, &mine);
    let second = place.records();
    assert!(!second.outlive(), "another has it");
    drop(first);
    let mut third = place.records();
    assert!(third.outlive() && knows(&mut third, 3, &mine));
    let fd = third.fd().unwrap().try_clone_to_owned().unwrap();
    let mut heir = Records::new(None, &place.socket(), 2);
    heir.take_over(fd, &place.state(), &place.socket(), 2);
    drop(third);
    assert!(heir.outlive() && knows(&mut heir, 3, &mine));
    remove_record(&place.state(), &place.socket());
    assert!(place.file().exists(), "not while somebody has it");
    heir.forget(RingIndex(3));
    assert!(!knows(&mut heir, 3, &mine));
    drop(heir);
    remove_record(&place.state(), &place.socket());
    assert!(!place.file().exists());
}

#[test]
fn a_port_may_have_more_queues_the_next_time() {
    let place = Place::new();
    let mine = identity(|_, _| ());
    leave(&mut place.records(), 3, &mine);
    let mut more = Records::new(Some(&place.state()), &place.socket(), 128);
    assert!(knows(&mut more, 3, &mine));
    leave(&mut more, 255, &mine);
    drop(more);
    assert!(knows(&mut place.records(), 3, &mine), "and fewer");
}

#[test]
fn what_cannot_be_a_record_is_ignored() {
    let place = Place::new();
    let mine = identity(|_, _| ());
    for spoil in [0, 1, 2, 3] {
        leave(&mut place.records(), 0, &mine);
        let mut bytes = fs::read(place.file()).unwrap();
        match spoil {
            0 => bytes.truncate(4000),
            1 => bytes[8] ^= 1,
            2 => bytes[16] ^= 1,
            _ => bytes = b"no record".to_vec(),
        }
        fs::write(place.file(), bytes).unwrap();
        let mut records = place.records();
        assert!(records.outlive());
        assert!(!knows(&mut records, 0, &mine), "{spoil}");
        leave(&mut records, 0, &mine);
        assert!(knows(&mut records, 0, &mine), "and used from then on");
    }
}

#[test]
fn nobody_else_may_write_to_the_directory() {
    let place = Place::new();
    drop(place.records());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&place.state()), mode(&place.file())), (0o700, 0o600));
    fs::set_permissions(place.state(), fs::Permissions::from_mode(0o777)).unwrap();
    let error = prepare_state_dir(&place.state()).unwrap_err().to_string();
    assert!(error.contains("mode 0777") && error.contains("mode 0700"), "{error}");
    let file = place.dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(prepare_state_dir(&file).is_err());
    let link = Place::new();
    std::os::unix::fs::symlink(&file, link.file()).unwrap();
    assert!(!link.records().outlive(), "links are not followed");
    assert_eq!(fs::read(&file).unwrap(), b"");
}

#[test]
fn files_of_sockets_that_are_gone_are_removed() {
    let (place, gone) = (Place::new(), tempfile::tempdir().unwrap());
    let other = gone.path().join("other.sock");
    let kept = Records::new(Some(&place.state()), &other, 1);
    drop(place.records());
    let count = || fs::read_dir(place.state()).unwrap().count();
    assert_eq!(count(), 2);
    drop(gone);
    prepare_state_dir(&place.state()).unwrap();
    assert_eq!(count(), 2, "one is in use, the other's directory is there");
    drop(kept);
    fs::write(place.state().join("note"), "not a record").unwrap();
    prepare_state_dir(&place.state()).unwrap();
    assert_eq!(count(), 2);
    assert!(place.file().exists() && place.state().join("note").exists());
}

#[test]
fn without_a_file_positions_are_kept_for_later_connections() {
    let place = Place::new();
    let nowhere = place.dir.path().join("none");
    let mine = identity(|_, _| ());
    for dir in [None, Some(nowhere.as_path())] {
        let mut private = Records::new(dir, &place.socket(), 2);
        assert!(!private.outlive());
        leave(&mut private, 0, &mine);
        assert!(knows(&mut private, 0, &mine));
    }
}
