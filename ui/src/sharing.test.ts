import { expect, test } from "vitest";
import { bitsOf, Heat, Sharing } from "./sharing";
import type { Bundle } from "./types";

function pack(values: number[]): string {
  return btoa(String.fromCharCode(...new Uint8Array(new Int32Array(values).buffer)));
}

// Three variants, one layer, five experts: shared by all, shared with a delta of v1, two together, each its own, absent.
const bundle = {
  name: "test",
  layers: ["0"],
  num_experts: 5,
  expert_bytes: 100,
  variants: ["a", "b", "c"].map((name) => ({ name, source: "/models/it's" })),
  base_pools: [{ stored: 1, int4: 7 }],
  delta_pools: [{ d2: 1 }],
  base_bytes: [{ stored: 100, int4: 30 }],
  delta_bytes: [{ d2: 15 }],
  table: pack([0, 1, 2, 4, -1, 0, 1, 2, 5, -2, 0, 1, 3, 6, -3]),
  delta: pack([-1, -1, -1, -1, -1, -1, 0, -1, -1, -1, -1, -1, -1, -1, -1]),
  position_errors: [[0, 1e-4, 0, 0, 0]],
} as unknown as Bundle;

test("kinds of sharing", () => {
  const sharing = new Sharing(bundle);
  const kinds = (v: number) => [0, 1, 2, 3, 4].map((e) => sharing.kind(v, 0, e));
  expect(kinds(0)).toEqual(["shared", "shared", "some", "own", "absent"]);
  expect(kinds(1)).toEqual(["shared", "delta", "some", "own", "absent"]);
  expect(kinds(2)).toEqual(["shared", "shared", "own", "own", "absent"]);
  expect(sharing.counts(1)).toEqual({ shared: 1, delta: 1, some: 1, own: 1, absent: 1 });
});

test("what a position holds", () => {
  const sharing = new Sharing(bundle);
  expect(sharing.position(1, 0, 1)).toEqual({
    kind: "delta", owners: ["a", "b", "c"], base: "int4", delta: "d2", bytes: 45, deltaBytes: 15, error: 1e-4,
  });
  expect(sharing.position(0, 0, 0)).toMatchObject({ base: "stored", delta: "", bytes: 100 });
  expect(sharing.position(0, 0, 4)).toMatchObject({ base: "", owners: ["a"], bytes: 100 });
  expect(sharing.same(0, 1, 0, 0)).toBe(true);
  expect(sharing.same(0, 1, 0, 1)).toBe(false);
});

test("bits of positions", () => {
  const sharing = new Sharing(bundle);
  expect([0, 1, 4].map((e) => sharing.bitsAt("base", 1, 0, e))).toEqual([16, 4, 0]);
  expect([0, 1, 4].map((e) => sharing.bitsAt("delta", 1, 0, e))).toEqual([0, 2, 0]);
});

test("bits of formats", () => {
  expect(["int4", "d2", "fp8", "stored", "exact", ""].map(bitsOf)).toEqual([4, 2, 8, 16, 16, 0]);
});

test("heat is relative to the busiest expert of a layer, and fades", () => {
  const heat = new Heat(1, 2, 2);
  expect(heat.level(0, 0, 0)).toBe(1);
  heat.add(new Uint16Array([10, 5, 0, 0]), 2);
  expect([heat.level(0, 0, 0), heat.level(0, 0, 1), heat.level(0, 1, 0)]).toEqual([1, 0.5, 0]);
  for (let i = 0; i < 60; i++) heat.add(new Uint16Array(4), 1);
  expect(heat.hits(0, 0, 0)).toBeLessThan(0.01);
});
