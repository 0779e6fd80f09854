/** What the server does now and did in the last quarter of an hour. */

import { useState } from "preact/hooks";
import { Chart } from "./chart";
import { bytes, percent, seconds, short } from "./format";
import { type History, sum, worst } from "./history";
import type { Snapshot } from "./types";

export function Live({ history, variants }: { history: History; variants: string[] }) {
  const [chosen, setChosen] = useState(-1);
  const shown = variants.map((name, v) => ({ name, v })).filter(({ v }) => chosen < 0 || v === chosen);
  const times = history.times;
  const each = (of: (snapshot: Snapshot) => readonly number[]) =>
    shown.map(({ name, v }) => ({ name, values: history.column((s) => of(s)[v]) }));
  const latencies = (of: (snapshot: Snapshot) => Snapshot["ttft"]) =>
    (["p50", "p95", "p99"] as const).map((name, which) => ({
      name,
      values: history.column((s) => worst(of(s), which as 0 | 1 | 2, chosen)),
    }));
  const now = history.latest;
  return (
    <div>
      <div class="controls card wide">
        <label>
          Variant
          <select
            value={String(chosen)}
            onChange={(event) => {
              setChosen(Number(event.currentTarget.value));
            }}
          >
            <option value="-1">all</option>
            {variants.map((name, v) => (
              <option key={name} value={String(v)}>
                {name}
              </option>
            ))}
          </select>
        </label>
        <dl class="figures">
          <Figure name="tokens/s" value={now === undefined ? "–" : short(sum(now.tokens))} />
          <Figure name="running" value={now === undefined ? "–" : String(sum(now.running))} />
          <Figure name="waiting" value={now === undefined ? "–" : String(sum(now.waiting))} />
          <Figure name="KV cache" value={now === undefined ? "–" : percent(now.kv_usage, 0)} />
          <Figure name="TTFT p95" value={now === undefined ? "–" : seconds(worst(now.ttft, 1, chosen))} />
        </dl>
      </div>
      <div class="charts">
        <Chart title="Tokens a second" times={times} series={each((s) => s.tokens)} show={short} />
        <Chart title="Running" times={times} series={each((s) => s.running)} show={short} />
        <Chart title="Waiting" times={times} series={each((s) => s.waiting)} show={short} />
        <Chart title="Time to the first token, last 10 s" times={times} series={latencies((s) => s.ttft)} show={seconds} />
        <Chart title="Between two tokens, last 10 s" times={times} series={latencies((s) => s.itl)} show={seconds} />
        <Chart
          title="Cache"
          times={times}
          series={[
            { name: "KV used", values: history.column((s) => s.kv_usage) },
            {
              name: "prefix hits",
              values: history.column((s) => (s.prefix_queries > 0 ? s.prefix_hits / s.prefix_queries : null)),
            },
          ]}
          show={(value) => percent(value, 0)}
        />
        <Chart
          title="Events a second"
          times={times}
          series={[
            { name: "reconfigurations", values: history.column((s) => s.reconfigurations) },
            { name: "preemptions", values: history.column((s) => s.preemptions) },
            { name: "errors", values: history.column((s) => sum(s.errors)) },
          ]}
          show={short}
        />
        <Chart
          title="From the host, bytes a second"
          times={times}
          series={[
            { name: "absent experts", values: history.column((s) => s.host_bytes) },
            { name: "reconfigurations", values: history.column((s) => s.reconfiguration_bytes) },
          ]}
          show={bytes}
        />
      </div>
    </div>
  );
}

function Figure({ name, value }: { name: string; value: string }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{value}</dd>
    </div>
  );
}
