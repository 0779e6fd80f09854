/** The last quarter of an hour as columns, of a fixed length, which charts read. */

import type { Snapshot } from "./types";

export const KEPT = 900; // seconds

export class History {
  readonly snapshots: Snapshot[] = [];

  reset(snapshots: Snapshot[]): void {
    this.snapshots.splice(0, this.snapshots.length, ...snapshots.slice(-KEPT));
  }

  add(snapshot: Snapshot): void {
    this.snapshots.push(snapshot);
    if (this.snapshots.length > KEPT) this.snapshots.splice(0, this.snapshots.length - KEPT);
  }

  get latest(): Snapshot | undefined {
    return this.snapshots[this.snapshots.length - 1];
  }

  column(of: (snapshot: Snapshot) => number | null | undefined): (number | null)[] {
    return this.snapshots.map((snapshot) => of(snapshot) ?? null);
  }

  get times(): number[] {
    return this.snapshots.map((snapshot) => snapshot.time);
  }
}

export function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0);
}

/** The largest percentile of all variants, or of one. */
export function worst(
  values: readonly (readonly [number, number, number] | null)[],
  which: 0 | 1 | 2,
  variant: number,
): number | null {
  const found = values
    .filter((_, v) => variant < 0 || v === variant)
    .flatMap((one) => (one === null ? [] : [one[which]]));
  return found.length === 0 ? null : Math.max(...found);
}
