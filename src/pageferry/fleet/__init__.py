"""Fleets: many hosts, and plans that place, move and clone workloads on them.

`model` defines the records of hosts, workloads and plans. The planner (`costs`, `planning`) and the state machine that
carries out a plan (`execution`) are pure: they neither communicate nor read a clock. The same code therefore controls
real moves and the simulation (docs/decisions/0030-fleet-planner.md).
"""
