/** A page for mailing: the parts that a command names in the JSON beside this script. */

import { type ComponentChild, render } from "preact";
import { LINES } from "./colours";
import { Dial } from "./dial";
import { short } from "./format";
import { DistanceMap, ExpertMap } from "./map";
import { Memory } from "./memory";
import type { Bundle } from "./types";
import { Variants } from "./variants";
import "./style.css";

interface Bar {
  name: string;
  value: number;
  low: number;
  high: number;
}

type Section =
  | { kind: "bundle"; bundle: Bundle }
  | { kind: "distances"; layers: string[]; values: number[][] }
  | { kind: "table"; title: string; columns: string[]; rows: string[][] }
  | { kind: "bars"; title: string; unit: string; bars: Bar[] }
  | { kind: "text"; text: string };

interface Report {
  title: string;
  made: string;
  sections: Section[];
}

function Table({ title, columns, rows }: { title: string; columns: string[]; rows: string[][] }) {
  return (
    <section class="card wide">
      <h2>{title}</h2>
      <div class="scroll" tabIndex={0} role="region" aria-label={title}>
        <table>
          <thead>
            <tr>
              {columns.map((name) => (
                <th key={name} scope="col">
                  {name}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {rows.map((row, i) => (
              <tr key={i}>
                {row.map((cell, j) =>
                  j === 0 ? (
                    <th key={j} scope="row">
                      {cell}
                    </th>
                  ) : (
                    <td key={j} class="number">
                      {cell}
                    </td>
                  ),
                )}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </section>
  );
}

function Bars({ title, unit, bars }: { title: string; unit: string; bars: Bar[] }) {
  const most = Math.max(1e-9, ...bars.map((bar) => bar.high));
  return (
    <section class="card wide">
      <h2>{title}</h2>
      {bars.map((bar, i) => (
        <div class="barline" key={bar.name}>
          <div class="barhead">
            <span>{bar.name}</span>
            <span class="muted">
              {short(bar.value)} {unit}
              {bar.low === bar.high ? "" : ` (${short(bar.low)}–${short(bar.high)})`}
            </span>
          </div>
          <div class="bar">
            <span style={{ width: `${String((100 * bar.value) / most)}%`, background: LINES[i % LINES.length] ?? "#000" }} />
          </div>
        </div>
      ))}
    </section>
  );
}

function part(section: Section, i: number): ComponentChild {
  switch (section.kind) {
    case "bundle":
      return (
        <>
          <ExpertMap key={i} bundle={section.bundle} />
          <Memory bundle={section.bundle} />
          <Dial bundle={section.bundle} />
          <Variants bundle={section.bundle} />
        </>
      );
    case "distances":
      return <DistanceMap key={i} layers={section.layers} values={section.values} />;
    case "table":
      return <Table key={i} {...section} />;
    case "bars":
      return <Bars key={i} {...section} />;
    case "text":
      return (
        <p key={i} class="card wide">
          {section.text}
        </p>
      );
  }
}

const report = JSON.parse(document.getElementById("report")?.textContent ?? "{}") as Report;
const place = document.getElementById("app");
if (place !== null) {
  render(
    <>
      <header>
        <h1>{report.title}</h1>
        <span class="status">{report.made}</span>
      </header>
      <main id="main">
        <div class="cards two">{report.sections.map(part)}</div>
      </main>
    </>,
    place,
  );
}
