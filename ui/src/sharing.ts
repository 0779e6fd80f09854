/** Who shares what: from the tables of a bundle to what the map says of a position. No drawing. */

import type { Bundle } from "./types";

export const KINDS = ["shared", "delta", "some", "own", "absent"] as const;
export type Kind = (typeof KINDS)[number];

export const KIND_NAMES: Record<Kind, string> = {
  shared: "shared by all",
  delta: "shared base + own delta",
  some: "shared with some",
  own: "separate",
  absent: "absent (host)",
};

export interface Position {
  kind: Kind;
  owners: string[]; // variants with the same base, itself among them
  base: string; // format; "" where it is absent
  delta: string; // format; "" for none
  bytes: number; // base and delta
  deltaBytes: number;
  error: number | null; // nats a token, predicted
}

export function decodeInt32(text: string): Int32Array {
  const raw = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Int32Array(raw.buffer);
}

export function decodeUint16(text: string): Uint16Array {
  const raw = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Uint16Array(raw.buffer);
}

/** Format of a physical id: ids run through the pools in order. */
function formatOf(pools: Record<string, number> | undefined, id: number): string {
  let left = id;
  for (const [name, count] of Object.entries(pools ?? {})) {
    if (left < count) return name;
    left -= count;
  }
  return "";
}

export class Sharing {
  readonly variants: string[];
  readonly layers: number;
  readonly experts: number;
  readonly maxError: number;
  private readonly table: Int32Array;
  private readonly delta: Int32Array | null;
  private readonly kinds: Uint8Array; // [V · L · E], index into KINDS
  private readonly bits: Record<"base" | "delta", Uint8Array>; // [V · L · E], so that a map is quick

  constructor(private readonly bundle: Bundle) {
    this.variants = bundle.variants.map((variant) => variant.name);
    this.layers = bundle.layers.length;
    this.experts = bundle.num_experts;
    this.table = decodeInt32(bundle.table);
    this.delta = bundle.delta === null ? null : decodeInt32(bundle.delta);
    this.maxError = Math.max(0, ...(bundle.position_errors ?? []).map((row) => Math.max(...row)));
    this.kinds = new Uint8Array(this.table.length);
    const size = this.layers * this.experts;
    const bits = (ids: Int32Array | null, pools: Record<string, number>[]) =>
      Uint8Array.from({ length: this.table.length }, (_, i) => {
        const id = ids?.[i] ?? -1;
        return id < 0 ? 0 : bitsOf(formatOf(pools[Math.floor((i % size) / this.experts)], id));
      });
    this.bits = { base: bits(this.table, bundle.base_pools), delta: bits(this.delta, bundle.delta_pools) };
    for (let v = 0; v < this.variants.length; v++) {
      for (let p = 0; p < size; p++) this.kinds[v * size + p] = this.kindOf(v, p, size);
    }
  }

  private kindOf(variant: number, p: number, size: number): number {
    const base = this.table[variant * size + p] ?? -1;
    if (base < 0) return 4;
    let users = 0;
    for (let v = 0; v < this.variants.length; v++) users += Number(this.table[v * size + p] === base);
    const corrected = this.delta !== null && (this.delta[variant * size + p] ?? -1) >= 0;
    if (users === 1 && this.variants.length > 1) return 3;
    if (corrected) return 1;
    return users === this.variants.length ? 0 : 2;
  }

  index(variant: number, layer: number, expert: number): number {
    return (variant * this.layers + layer) * this.experts + expert;
  }

  kind(variant: number, layer: number, expert: number): Kind {
    return KINDS[this.kinds[this.index(variant, layer, expert)] ?? 0] ?? "shared";
  }

  bitsAt(of: "base" | "delta", variant: number, layer: number, expert: number): number {
    return this.bits[of][this.index(variant, layer, expert)] ?? 0;
  }

  errorAt(layer: number, expert: number): number {
    return this.bundle.position_errors?.[layer]?.[expert] ?? 0;
  }

  /** Whether two variants are served by the same numbers at a position. */
  same(a: number, b: number, layer: number, expert: number): boolean {
    const i = this.index(a, layer, expert);
    const j = this.index(b, layer, expert);
    return this.table[i] === this.table[j] && (this.delta === null || this.delta[i] === this.delta[j]);
  }

  position(variant: number, layer: number, expert: number): Position {
    const at = this.index(variant, layer, expert);
    const physical = this.table[at] ?? -1;
    const owners = this.variants.filter((_, v) => this.table[this.index(v, layer, expert)] === physical);
    const correction = this.delta === null ? -1 : (this.delta[at] ?? -1);
    const base = physical < 0 ? "" : formatOf(this.bundle.base_pools[layer], physical);
    const delta = correction < 0 ? "" : formatOf(this.bundle.delta_pools[layer], correction);
    const baseBytes = physical < 0 ? this.bundle.expert_bytes : (this.bundle.base_bytes[layer]?.[base] ?? 0);
    const deltaBytes = delta === "" ? 0 : (this.bundle.delta_bytes[layer]?.[delta] ?? 0);
    return {
      kind: this.kind(variant, layer, expert),
      owners,
      base,
      delta,
      bytes: baseBytes + deltaBytes,
      deltaBytes,
      error: this.bundle.position_errors?.[layer]?.[expert] ?? null,
    };
  }

  counts(variant: number): Record<Kind, number> {
    const found = { shared: 0, delta: 0, some: 0, own: 0, absent: 0 };
    for (let layer = 0; layer < this.layers; layer++) {
      for (let expert = 0; expert < this.experts; expert++) found[this.kind(variant, layer, expert)] += 1;
    }
    return found;
  }
}

/** Bits of a format by its name: "int4" 4, "d2" 2, "fp8" 8, "stored" 16. */
export function bitsOf(format: string): number {
  if (format === "") return 0;
  if (format === "stored" || format === "exact") return 16;
  return Number(/\d+/.exec(format)?.[0] ?? 16);
}

/** Routed tokens of the last half minute or so, as a share of the most at any position of the layer. */
export class Heat {
  private readonly decayed: Float64Array;
  private readonly most: Float64Array;
  any = false;

  constructor(private readonly variants: number, private readonly layers: number, private readonly experts: number) {
    this.decayed = new Float64Array(variants * layers * experts);
    this.most = new Float64Array(variants * layers);
  }

  add(counts: Uint16Array, scale: number): void {
    for (let i = 0; i < this.decayed.length; i++) {
      this.decayed[i] = (this.decayed[i] ?? 0) * 0.85 + (counts[i] ?? 0) * scale;
    }
    for (let row = 0; row < this.variants * this.layers; row++) {
      let most = 0;
      for (let e = 0; e < this.experts; e++) most = Math.max(most, this.decayed[row * this.experts + e] ?? 0);
      this.most[row] = most;
      if (most > 0.5) this.any = true;
    }
  }

  hits(variant: number, layer: number, expert: number): number {
    return this.decayed[(variant * this.layers + layer) * this.experts + expert] ?? 0;
  }

  /** 0 … 1; 1 while nothing is known. */
  level(variant: number, layer: number, expert: number): number {
    const most = this.most[variant * this.layers + layer] ?? 0;
    return most < 0.5 ? (this.any ? 0 : 1) : this.hits(variant, layer, expert) / most;
  }
}
