//! Test only: driver mocks, fake front end, ledger, virtual clock, seeded faults.
