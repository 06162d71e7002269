"""Prints what every scene costs, and a shortest trace to what goes wrong without each rule."""

from __future__ import annotations

import time

from protocol_model.cases import LARGE_SCENES, MISSED_RULES, SCENES, Scene


def _print_scene(scene: Scene) -> None:
    start_s = time.perf_counter()
    found = scene.search(None)
    seconds = time.perf_counter() - start_s
    bound = "all" if found.is_complete else "the first"
    print(f"{scene.name:<50} {bound} {found.num_states} states, {seconds:.1f} s: {found.violation or 'holds'}")


def main() -> None:
    for scene in (*SCENES, *LARGE_SCENES):
        _print_scene(scene)
    for missed in MISSED_RULES:
        print(f"\nwithout {missed.rule} ({missed.scene.name})\n  {missed.scene.search(missed.rule).violation}")


main()
