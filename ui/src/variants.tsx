/** Each variant: what it is, how faithful, and whether it is served. */

import { bytes, percent, short } from "./format";
import type { Bundle } from "./types";

export function Variants({ bundle }: { bundle: Bundle }) {
  const engine = bundle.engine;
  const resident = engine === undefined ? null : engine.slots >= bundle.variants.length;
  const columns = ["variant", "version", "from", "KL", "predicted", "same first token", "perplexity", "measured on", "context", "adds"];
  return (
    <section class="card wide" aria-labelledby="variants-title">
      <h2 id="variants-title">Variants</h2>
      <p class="muted">
        {bundle.architecture}, policy {bundle.policy} {bundle.memory}, planned by polymoe {bundle.polymoe_version}.
        {engine === undefined
          ? ""
          : ` ${engine.dtype} on ${engine.device}; ${String(engine.experts_resident)} experts resident, ${String(engine.experts_absent)} absent.`}
      </p>
      <div class="scroll" tabIndex={0} role="region" aria-label="Table of variants">
        <table>
          <thead>
            <tr>
              {[...columns, ...(engine === undefined ? [] : ["non-experts", "status"])].map((name) => (
                <th key={name} scope="col">
                  {name}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {bundle.variants.map((variant, v) => {
              const found = variant.fidelity;
              const fault = engine?.faults[variant.name];
              return (
                <tr key={variant.name}>
                  <th scope="row">{variant.name}</th>
                  <td>
                    <code title={variant.version}>{variant.version.slice(0, 12)}</code>
                  </td>
                  <td class="path">{variant.source}</td>
                  <td class="number">{found === null ? "–" : short(found.kl)}</td>
                  <td class="number">{variant.predicted_damage === null ? "–" : short(variant.predicted_damage)}</td>
                  <td class="number">{found === null ? "–" : percent(found.top1)}</td>
                  <td class="number">
                    {found === null ? "–" : `${short(found.perplexity_served)} (original ${short(found.perplexity_original)})`}
                  </td>
                  <td>{found === null ? "not measured" : `${found.text || "a text"}, ${String(found.tokens)} tokens`}</td>
                  <td class="number">{engine?.max_model_len[v] ?? variant.max_model_len}</td>
                  <td class="number">{bytes(bundle.added_bytes[v] ?? 0)}</td>
                  {engine === undefined ? null : (
                    <>
                      <td>{resident === true ? "resident" : "on demand"}</td>
                      <td class={fault === undefined ? "" : "error"}>{fault === undefined ? "served" : `not served: ${fault}`}</td>
                    </>
                  )}
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
      {engine === undefined ? null : (
        <details>
          <summary>What its operations run on</summary>
          <ul>
            {engine.fast_paths.map((path, i) => (
              <li key={i}>
                {path.part}: {path.count} on {path.runs_on}
                {path.reason === "" ? "" : ` (${path.reason})`}
              </li>
            ))}
          </ul>
        </details>
      )}
    </section>
  );
}
