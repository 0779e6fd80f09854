/** The last thousand requests: filter them, follow one. */

import { useState } from "preact/hooks";
import { clock, seconds } from "./format";
import type { RequestRecord } from "./types";

const SHOWN = 100;
export const MOST = 1000;

/** Newest last, each once, no more than the server keeps. */
export function merge(known: RequestRecord[], changed: RequestRecord[]): RequestRecord[] {
  const found = new Map(known.map((record) => [record.number, record]));
  for (const record of changed) found.set(record.number, record);
  return [...found.values()].sort((a, b) => a.number - b.number).slice(-MOST);
}

export function matches(record: RequestRecord, filter: string): boolean {
  const text = [record.id, record.variant, record.tenant, record.kind, record.finish ?? "running", record.error ?? "", record.prompt ?? ""]
    .join(" ")
    .toLowerCase();
  return filter
    .toLowerCase()
    .split(/\s+/)
    .every((word) => text.includes(word));
}

export function Requests({ records, logsPrompts }: { records: RequestRecord[]; logsPrompts: boolean }) {
  const [filter, setFilter] = useState("");
  const [many, setMany] = useState(SHOWN);
  const [followed, setFollowed] = useState<number | null>(null);
  const found = records.filter((record) => matches(record, filter)).reverse();
  const one = records.find((record) => record.number === followed);
  return (
    <section class="card wide" aria-labelledby="requests-title">
      <h2 id="requests-title">Requests</h2>
      <div class="controls">
        <label>
          Filter
          <input
            type="search"
            value={filter}
            placeholder="variant, tenant, error …"
            onInput={(event) => {
              setFilter(event.currentTarget.value);
            }}
          />
        </label>
        <span class="muted">
          {found.length} of the last {records.length}
          {logsPrompts ? "" : " · prompts are not kept (--log-prompts)"}
        </span>
      </div>
      {one === undefined ? null : <Followed record={one} onClose={() => { setFollowed(null); }} />}
      <div class="scroll" tabIndex={0} role="region" aria-label="Table of requests">
        <table>
          <thead>
            <tr>
              {["", "time", "variant @ version", "tenant", "kind", "in", "out", "first token", "duration", "end"].map((name) => (
                <th key={name} scope="col">
                  {name === "" ? <span class="hidden">follow</span> : name}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {found.slice(0, many).map((record) => (
              <tr key={record.number} class={record.number === followed ? "chosen" : ""}>
                <td>
                  <button
                    type="button"
                    aria-label={`Follow ${record.id}`}
                    onClick={() => {
                      setFollowed(record.number);
                    }}
                  >
                    …
                  </button>
                </td>
                <td>{clock(record.time)}</td>
                <td>
                  {record.variant} <span class="muted">@ {record.version.slice(0, 8)}</span>
                </td>
                <td>{record.tenant || "–"}</td>
                <td>{record.kind}</td>
                <td class="number">{record.prompt_tokens}</td>
                <td class="number">{record.tokens}</td>
                <td class="number">{seconds(record.first_token)}</td>
                <td class="number">{record.duration === null ? "runs" : seconds(record.duration)}</td>
                <td class={record.error === null ? "" : "error"}>{record.error ?? record.finish ?? ""}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      {found.length > many ? (
        <button type="button" onClick={() => { setMany(many + SHOWN); }}>
          Show more
        </button>
      ) : null}
    </section>
  );
}

function Followed({ record, onClose }: { record: RequestRecord; onClose: () => void }) {
  return (
    <div class="followed" aria-live="polite">
      <p>
        <strong>{record.id}</strong> · {record.variant} @ {record.version.slice(0, 12)} · {record.prompt_tokens} tokens in,{" "}
        {record.tokens} out · first after {seconds(record.first_token)} ·{" "}
        {record.duration === null ? "running" : `${record.finish ?? ""} after ${seconds(record.duration)}`}{" "}
        <button type="button" onClick={onClose}>
          Close
        </button>
      </p>
      {record.error === null ? null : <p class="error">{record.error}</p>}
      {record.prompt === null ? null : <pre class="command" tabIndex={0}>{record.prompt}</pre>}
    </div>
  );
}
