/** Fidelity against bytes, as the planner expected it for this family, and the command for a chosen point. */

import { useState } from "preact/hooks";
import { bytes, percent, short } from "./format";
import type { Bundle, DialPoint } from "./types";

const WIDE = 560;
const HIGH = 220;
const EDGE = { left: 80, right: 14, top: 12, bottom: 34 };
const GIB = 1024 ** 3;

/** What a budget would buy, between the points in bytes and, for KL, in its logarithm. */
export function at(dial: DialPoint[], size: number): DialPoint {
  const after = dial.findIndex((point) => point.expert_bytes >= size);
  const last = dial[dial.length - 1];
  const high = after < 0 ? last : dial[after];
  const low = after <= 0 ? high : dial[after - 1];
  if (high === undefined || low === undefined) return { expert_bytes: size, kl: 0, top1: 1 };
  const span = high.expert_bytes - low.expert_bytes;
  const share = span === 0 ? 1 : Math.min(1, (size - low.expert_bytes) / span);
  const floor = 1e-9;
  const kl = Math.exp(
    Math.log(Math.max(low.kl, floor)) * (1 - share) + Math.log(Math.max(high.kl, floor)) * share,
  );
  return {
    expert_bytes: size,
    kl: kl <= 2 * floor ? 0 : kl,
    top1: low.top1 * (1 - share) + high.top1 * share,
  };
}

const MIB = 1024 ** 2;

/** Bytes of what the curve is about. */
export function bytesNow(bundle: Bundle): number {
  const { resident_experts = 0, deltas = 0, ...others } = bundle.resident_bytes;
  const beside = bundle.dial_of === "all" ? Object.values(others).reduce((sum, value) => sum + value, 0) : 0;
  return resident_experts + deltas + beside;
}

/** `polymoe plan` for a budget in multiples of one model's experts or, where it is of all weights, in bytes. */
export function planCommand(bundle: Bundle, size: number): string {
  const one = bundle.expert_bytes * bundle.num_experts * bundle.layers.length;
  const sources = bundle.variants.map((variant) => `${variant.name}=${quoted(variant.source)}`).join(" ");
  const memory =
    bundle.dial_of === "all" ? `${String(Math.ceil((size / MIB) * 10) / 10)}MiB` : `${String(Math.ceil((size / one) * 1000) / 1000)}x`;
  return `polymoe plan ${sources} --memory ${memory} --out bundles/${bundle.name}-${memory}`;
}

function quoted(text: string): string {
  return /^[\w@./:+-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
}

export function Dial({ bundle }: { bundle: Bundle }) {
  const dial = bundle.dial;
  const now = bytesNow(bundle);
  const nearest = dial.reduce(
    (best, point, i) =>
      Math.abs(point.expert_bytes - now) < Math.abs((dial[best]?.expert_bytes ?? 0) - now) ? i : best,
    0,
  );
  const [chosen, setChosen] = useState(nearest);
  const measured = bundle.variants.flatMap((variant) => (variant.fidelity === null ? [] : [variant.fidelity]));
  const predicted = bundle.variants.flatMap((v) => (v.predicted_damage === null ? [] : [v.predicted_damage]));
  const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / Math.max(values.length, 1);
  const point = dial[chosen] ?? dial[0];
  return (
    <section class="card" aria-labelledby="dial-title">
      <h2 id="dial-title">Fidelity</h2>
      <p>
        This bundle: {bytes(now)} of {bundle.dial_of === "all" ? "weights" : "experts and deltas"}
        {predicted.length > 0 ? `, predicted KL ${short(mean(predicted))} nats a token` : ""}
        {measured.length > 0
          ? `; measured KL ${short(mean(measured.map((f) => f.kl)))}, same first token ${percent(mean(measured.map((f) => f.top1)))}`
          : "; not measured (polymoe plan --text, or polymoe eval)"}
        .
      </p>
      {dial.length < 2 || point === undefined ? (
        <p class="muted">
          There is no curve: policy {bundle.policy} predicts none. Plan with --policy auto to have one.
        </p>
      ) : (
        <>
          <Curve dial={dial} now={now} nowKl={predicted.length > 0 ? mean(predicted) : null} chosen={chosen} />
          <label class="block">
            Budget: {bytes(point.expert_bytes)}, KL {point.kl === 0 ? "0 (lossless)" : short(point.kl)}, same first
            token {percent(point.top1, 2)}
            <input
              type="range"
              min={0}
              max={dial.length - 1}
              value={chosen}
              aria-valuetext={`${bytes(point.expert_bytes)}, KL ${short(point.kl)}`}
              onInput={(event) => {
                setChosen(Number(event.currentTarget.value));
              }}
            />
          </label>
          <NextGib dial={dial} now={now} />
          <pre class="command" tabIndex={0} aria-label="Command for this budget">
            {planCommand(bundle, point.expert_bytes)}
          </pre>
        </>
      )}
    </section>
  );
}

function NextGib({ dial, now }: { dial: DialPoint[]; now: number }) {
  const last = dial[dial.length - 1];
  if (last === undefined) return null;
  if (now >= last.expert_bytes) return <p class="muted">More memory buys nothing: nothing is lost already.</p>;
  const more = now + GIB >= last.expert_bytes ? last.expert_bytes - now : GIB;
  const here = at(dial, now);
  const there = at(dial, now + more);
  return (
    <p>
      {more === GIB ? "The next GiB" : `The next ${bytes(more)}, all that is missing,`} would bring KL from about{" "}
      {short(here.kl)} to {there.kl === 0 ? "0" : short(there.kl)}.
    </p>
  );
}

function Curve(props: { dial: DialPoint[]; now: number; nowKl: number | null; chosen: number }) {
  const { dial, now, nowKl, chosen } = props;
  const sizes = [...dial.map((point) => point.expert_bytes), now];
  const losses = [...dial.map((point) => point.kl), nowKl ?? 0].filter((kl) => kl > 0);
  const [low, high] = [Math.min(...sizes), Math.max(...sizes)];
  const floor = Math.min(...losses) / 3;
  const most = Math.max(...losses);
  const x = (size: number) =>
    EDGE.left +
    ((WIDE - EDGE.left - EDGE.right) * Math.log(Math.max(size, 1) / low)) / Math.max(Math.log(high / low), 1e-9);
  const y = (kl: number) =>
    EDGE.top +
    ((HIGH - EDGE.top - EDGE.bottom) * Math.log(most / Math.max(kl, floor))) / Math.max(Math.log(most / floor), 1e-9);
  const line = dial.map((p) => `${x(p.expert_bytes).toFixed(1)},${y(p.kl).toFixed(1)}`).join(" ");
  const marks = [most, Math.sqrt(most * floor), floor];
  return (
    <svg
      viewBox={`0 0 ${String(WIDE)} ${String(HIGH)}`}
      class="curve"
      role="img"
      aria-label={`KL against bytes, from ${bytes(low)} to ${bytes(high)}; this bundle has ${bytes(now)}`}
    >
      {marks.map((kl, i) => (
        <g key={i}>
          <line x1={EDGE.left} x2={WIDE - EDGE.right} y1={y(kl)} y2={y(kl)} class="gridline" />
          <text x={EDGE.left - 8} y={y(kl) + 4} text-anchor="end">
            {i === 2 ? "0" : short(kl)}
          </text>
        </g>
      ))}
      {[low, Math.sqrt(low * high), high].map((size, i) => (
        <text key={i} x={x(size)} y={HIGH - 10} text-anchor={i === 0 ? "start" : i === 1 ? "middle" : "end"}>
          {bytes(size)}
        </text>
      ))}
      <polyline points={line} class="dialline" />
      {dial.map((p, i) => (
        <circle
          key={i}
          cx={x(p.expert_bytes)}
          cy={y(p.kl)}
          r={i === chosen ? 7 : 4}
          class={i === chosen ? "chosen" : "point"}
        />
      ))}
      {nowKl === null ? null : (
        <g>
          <line x1={x(now)} x2={x(now)} y1={EDGE.top} y2={HIGH - EDGE.bottom} class="here" />
          <rect x={x(now) - 5} y={y(nowKl) - 5} width="10" height="10" class="herepoint" />
          <text x={x(now) + 9} y={EDGE.top + 10}>
            this bundle
          </text>
        </g>
      )}
    </svg>
  );
}
