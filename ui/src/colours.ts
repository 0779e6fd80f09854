/** Colours that people with any colour vision can tell apart (Okabe and Ito), and a scale that grows in lightness. */

import type { Kind } from "./sharing";

export type Rgb = readonly [number, number, number];

export const KIND_COLOURS: Record<Kind, Rgb> = {
  shared: [0, 114, 178],
  delta: [0, 158, 115],
  some: [86, 180, 233],
  own: [230, 159, 0],
  absent: [150, 150, 150],
};

/** Of lines and bars, one a variant. */
export const LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#8c6d1f"];

const SCALE: Rgb[] = [
  [68, 1, 84],
  [59, 82, 139],
  [33, 145, 140],
  [94, 201, 98],
  [253, 231, 37],
];

/** 0 … 1 -> dark to light (viridis). */
export function scale(value: number): Rgb {
  const place = Math.min(1, Math.max(0, value)) * (SCALE.length - 1);
  const low = SCALE[Math.floor(place)] ?? [0, 0, 0];
  const high = SCALE[Math.ceil(place)] ?? [0, 0, 0];
  return mix(high, low, place - Math.floor(place));
}

/** `share` of the first colour, the rest of the second. */
export function mix(first: Rgb, second: Rgb, share: number): Rgb {
  const part = (i: 0 | 1 | 2) => Math.round(first[i] * share + second[i] * (1 - share));
  return [part(0), part(1), part(2)];
}

export function css(colour: Rgb): string {
  return `rgb(${colour[0]},${colour[1]},${colour[2]})`;
}
