//! Runs the examples.

#[path = "../examples/toy_vmm.rs"]
#[expect(dead_code, reason = "its main")]
mod toy_vmm;

#[test]
fn the_toy_vmm_loops_a_frame_back() {
    let frame = toy_vmm::run().unwrap();
    assert_eq!(frame[14..], *b"hello, toy VMM");
    assert_eq!(frame.len(), 28);
}
