/** Where the memory goes, to scale, and what as many separate models would take. */

import { LINES } from "./colours";
import { bytes, percent } from "./format";
import type { Bundle } from "./types";

const NAMES: Record<string, string> = {
  resident_experts: "expert pool",
  deltas: "deltas",
  nonexperts_shared: "non-experts, shared",
  nonexperts_own: "non-experts, own",
  tables: "tables",
  expert_cache: "expert cache",
  kv_cache: "KV cache",
  workspace: "workspace",
  free: "free, or of others",
};
const WEIGHTS = ["resident_experts", "deltas", "nonexperts_shared", "nonexperts_own", "tables"];
const COLOURS = ["#0072b2", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d1f", "#7f7f7f", "#c8c8c8"];

interface Part {
  name: string;
  size: number;
  colour: string;
}

function partsOf(sizes: Record<string, number>): Part[] {
  const order = Object.keys(NAMES);
  return Object.entries(sizes)
    .filter(([, size]) => size > 0)
    .map(([kind, size]) => ({
      name: NAMES[kind] ?? kind.replaceAll("_", " "),
      size,
      colour: COLOURS[order.indexOf(kind)] ?? "#7f7f7f",
    }));
}

function Bar({ title, parts, total }: { title: string; parts: Part[]; total: number }) {
  const used = parts.reduce((sum, part) => sum + part.size, 0);
  const said = parts.map((part) => `${part.name} ${bytes(part.size)}`).join(", ");
  return (
    <div class="barline">
      <div class="barhead">
        <span>{title}</span>
        <span class="muted">{bytes(used)}</span>
      </div>
      <div class="bar" role="img" aria-label={`${title}: ${said}`}>
        {parts.map((part) => (
          <span
            key={part.name}
            title={`${part.name}: ${bytes(part.size)}`}
            style={{ width: `${String((100 * part.size) / Math.max(total, 1))}%`, background: part.colour }}
          />
        ))}
      </div>
    </div>
  );
}

export function Memory({ bundle }: { bundle: Bundle }) {
  const resident = bundle.engine?.resident_bytes ?? bundle.resident_bytes;
  const weights = partsOf(Object.fromEntries(WEIGHTS.map((kind) => [kind, resident[kind] ?? 0])));
  const used = weights.reduce((sum, part) => sum + part.size, 0);
  const separate = bundle.separate_bytes.reduce((sum, size) => sum + size, 0);
  const alone = bundle.variants.map((variant, v) => ({
    name: variant.name,
    size: bundle.separate_bytes[v] ?? 0,
    colour: LINES[v % LINES.length] ?? "#7f7f7f",
  }));
  const added = bundle.variants.map((variant, v) => ({
    name: variant.name,
    size: bundle.added_bytes[v] ?? 0,
    colour: LINES[v % LINES.length] ?? "#7f7f7f",
  }));
  const most = Math.max(used, separate);
  const count = bundle.variants.length;
  const device = bundle.engine?.device_bytes ?? null;
  let all: Part[] = [];
  let whole = 0;
  if (bundle.engine !== undefined) {
    const held = { ...resident, workspace: bundle.engine.workspace_bytes };
    const sum = Object.entries(held).reduce((total, [kind, size]) => total + (kind === "host_pinned" ? 0 : size), 0);
    all = partsOf({ ...held, host_pinned: 0, free: device === null ? 0 : Math.max(0, device - sum) });
    whole = device ?? sum;
  }
  const legend = [...new Map([...weights, ...all].map((part) => [part.name, part])).values()];
  return (
    <section class="card" aria-labelledby="memory-title">
      <h2 id="memory-title">Memory</h2>
      <p>
        {count} variants take <strong>{bytes(used)}</strong>; as separate models they would take{" "}
        <strong>{bytes(separate)}</strong>, {(separate / Math.max(used, 1)).toFixed(1)} times as much.
      </p>
      {whole > 0 ? <Bar title={`All of the device (${bundle.engine?.device ?? ""})`} parts={all} total={whole} /> : null}
      <Bar title="Weights, by kind" parts={weights} total={most} />
      <Bar title="Weights, what each variant adds to those before it" parts={added} total={most} />
      <Bar title={`${String(count)} separate models`} parts={alone} total={most} />
      <ul class="legend">
        {legend.map((part) => (
          <li key={part.name}>
            <span class="swatch" style={{ background: part.colour }} />
            {part.name} <span class="muted">{bytes(part.size)}</span>
          </li>
        ))}
      </ul>
      <ul class="legend">
        {added.map((part, v) => (
          <li key={part.name}>
            <span class="swatch" style={{ background: part.colour }} />
            {part.name}{" "}
            <span class="muted">
              {v === 0 ? "" : "+"}
              {bytes(part.size)} ({percent(part.size / Math.max(alone[v]?.size ?? 1, 1), 0)} of its model)
            </span>
          </li>
        ))}
      </ul>
    </section>
  );
}
