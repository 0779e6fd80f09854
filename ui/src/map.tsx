/** The expert map: how each position is stored for one variant, and how much of the load goes there. */

import { useMemo, useState } from "preact/hooks";
import { css, KIND_COLOURS, mix, type Rgb, scale } from "./colours";
import { bytes, short } from "./format";
import { Grid } from "./grid";
import { type Heat, KIND_NAMES, KINDS, Sharing } from "./sharing";
import type { Bundle } from "./types";

type By = "kind" | "base" | "delta" | "error";

const BY_NAMES: Record<By, string> = {
  kind: "how it is shared",
  base: "bits of the base",
  delta: "bits of the delta",
  error: "predicted error",
};
const MOST_BITS = { base: 16, delta: 6 };

export function ExpertMap({ bundle, heat, beat }: { bundle: Bundle; heat?: Heat; beat?: number }) {
  const sharing = useMemo(() => new Sharing(bundle), [bundle]);
  const [variant, setVariant] = useState(0);
  const [against, setAgainst] = useState(-1);
  const [by, setBy] = useState<By>("kind");
  const name = sharing.variants[variant] ?? "";
  const counts = sharing.counts(variant);
  const lit = heat?.any === true;

  function plain(layer: number, expert: number): Rgb {
    const kind = sharing.kind(variant, layer, expert);
    if (by === "kind" || kind === "absent") return KIND_COLOURS[kind];
    if (by === "error") return scale(sharing.maxError === 0 ? 0 : sharing.errorAt(layer, expert) / sharing.maxError);
    return scale(sharing.bitsAt(by, variant, layer, expert) / MOST_BITS[by]);
  }

  function colour(layer: number, expert: number, behind: Rgb): Rgb {
    let strength = lit ? 0.25 + 0.75 * (heat?.level(variant, layer, expert) ?? 1) : 1;
    if (against >= 0 && sharing.same(variant, against, layer, expert)) strength *= 0.15;
    return mix(plain(layer, expert), behind, strength);
  }

  function detail(layer: number, expert: number): string {
    const found = sharing.position(variant, layer, expert);
    const parts = [KIND_NAMES[found.kind]];
    if (found.base !== "") parts.push(`base ${found.base} of ${found.owners.join(", ")}`);
    if (found.delta !== "") parts.push(`delta ${found.delta}, ${bytes(found.deltaBytes)}`);
    parts.push(`${bytes(found.bytes)} ${found.kind === "absent" ? "on the host" : "in all"}`);
    if (found.error !== null) parts.push(`predicted error ${short(found.error)} nats`);
    if (lit && heat !== undefined) parts.push(`about ${heat.hits(variant, layer, expert).toFixed(0)} tokens lately`);
    return parts.join(" · ");
  }

  return (
    <section class="card wide" aria-labelledby="map-title">
      <h2 id="map-title">Expert map</h2>
      <div class="controls">
        <label>
          Variant: <strong>{name}</strong>
          <input
            type="range"
            min={0}
            max={Math.max(0, sharing.variants.length - 1)}
            value={variant}
            aria-valuetext={name}
            onInput={(event) => {
              setVariant(Number(event.currentTarget.value));
            }}
          />
        </label>
        <label>
          Colour
          <select
            value={by}
            onChange={(event) => {
              setBy(event.currentTarget.value as By);
            }}
          >
            {(Object.keys(BY_NAMES) as By[])
              .filter((key) => key !== "error" || bundle.position_errors !== null)
              .map((key) => (
                <option key={key} value={key}>
                  {BY_NAMES[key]}
                </option>
              ))}
          </select>
        </label>
        <label>
          Only what differs from
          <select
            value={String(against)}
            onChange={(event) => {
              setAgainst(Number(event.currentTarget.value));
            }}
          >
            <option value="-1">nobody: show all</option>
            {sharing.variants.map((other, v) => (
              <option key={other} value={String(v)} disabled={v === variant}>
                {other}
              </option>
            ))}
          </select>
        </label>
      </div>
      <Grid
        rows={bundle.layers}
        columns={bundle.num_experts}
        label={`Experts of ${name}: ${String(bundle.layers.length)} layers by ${String(bundle.num_experts)} experts`}
        colour={colour}
        detail={detail}
        version={`${String(variant)} ${by} ${String(against)} ${String(beat ?? 0)} ${bundle.name}`}
      />
      {by === "kind" ? (
        <ul class="legend">
          {KINDS.filter((kind) => counts[kind] > 0).map((kind) => (
            <li key={kind}>
              <span class="swatch" style={{ background: css(KIND_COLOURS[kind]) }} />
              {KIND_NAMES[kind]} <span class="muted">{counts[kind]}</span>
            </li>
          ))}
        </ul>
      ) : (
        <Scale by={by} most={by === "error" ? `${short(sharing.maxError)} nats` : `${String(MOST_BITS[by])} bits`} />
      )}
      {heat === undefined ? null : (
        <p class="muted">
          {lit
            ? "Brightness: how often tokens of this variant are routed there, against the busiest expert of the layer."
            : "Nothing is routed to this model now, so all positions are equally bright."}
        </p>
      )}
    </section>
  );
}

function Scale({ by, most }: { by: By; most: string }) {
  return (
    <ul class="legend">
      {[0, 0.25, 0.5, 0.75, 1].map((value) => (
        <li key={value}>
          <span class="swatch" style={{ background: css(scale(value)) }} />
          {value === 0 ? (by === "delta" ? "none" : "0") : value === 1 ? most : ""}
        </li>
      ))}
    </ul>
  );
}

/** How far the experts of checkpoints are apart: the picture of `polymoe inspect`. */
export function DistanceMap({ layers, values }: { layers: string[]; values: number[][] }) {
  const most = Math.max(1e-6, ...values.map((row) => Math.max(...row)));
  return (
    <section class="card wide" aria-labelledby="distances-title">
      <h2 id="distances-title">How far the variants' experts are apart</h2>
      <Grid
        rows={layers}
        columns={values[0]?.length ?? 0}
        label="Distances of experts by layer"
        colour={(layer, expert) => scale((values[layer]?.[expert] ?? 0) / most)}
        detail={(layer, expert) => `${short(100 * (values[layer]?.[expert] ?? 0))} % of the weights' norm`}
        version="distances"
      />
      <Scale by="base" most={`${short(100 * most)} %`} />
    </section>
  );
}
