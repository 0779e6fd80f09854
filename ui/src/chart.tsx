/** One chart over time, with the latest values in words beside it. */

import { useEffect, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import { LINES } from "./colours";

export interface Series {
  name: string;
  values: (number | null)[];
  dash?: number[];
}

interface Props {
  title: string;
  times: number[];
  series: Series[];
  show: (value: number) => string;
}

const HEIGHT = 150;

export function Chart({ title, times, series, show }: Props) {
  const holder = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const [dark, setDark] = useState(() => matchMedia("(prefers-color-scheme: dark)").matches);
  const names = series.map((one) => one.name).join("\0");
  const data: uPlot.AlignedData = [times, ...series.map((one) => one.values)];

  useEffect(() => {
    const query = matchMedia("(prefers-color-scheme: dark)");
    const changed = () => {
      setDark(query.matches);
    };
    query.addEventListener("change", changed);
    return () => {
      query.removeEventListener("change", changed);
    };
  }, []);

  useEffect(() => {
    const element = holder.current;
    if (element === null) return;
    const text = getComputedStyle(element).color;
    const grid = { stroke: dark ? "#3a4150" : "#e3e6eb", width: 1 };
    const axis = { stroke: text, grid, ticks: grid, font: "11px system-ui, sans-serif" };
    const made = new uPlot(
      {
        width: Math.max(200, element.clientWidth),
        height: HEIGHT,
        legend: { show: false },
        cursor: { drag: { x: false, y: false } },
        scales: { y: { range: (_, _low, high) => [0, Math.max(high * 1.1, 1e-9)] } },
        axes: [
          { ...axis, space: 70 },
          { ...axis, size: 64, space: 28, values: (_, splits) => splits.map((value) => show(value)) },
        ],
        series: [
          {},
          ...series.map((one, i) => ({
            label: one.name,
            stroke: LINES[i % LINES.length] ?? "#000",
            width: 1.5,
            dash: one.dash ?? [],
            points: { show: false },
            spanGaps: false,
          })),
        ],
      },
      data,
      element,
    );
    plot.current = made;
    const observer = new ResizeObserver(() => {
      made.setSize({ width: Math.max(200, element.clientWidth), height: HEIGHT });
    });
    observer.observe(element);
    return () => {
      observer.disconnect();
      made.destroy();
      plot.current = null;
    };
  }, [names, dark]);

  useEffect(() => {
    plot.current?.setData(data);
  });

  const last = series.map((one) => {
    const value = one.values[one.values.length - 1];
    return `${one.name} ${value === null || value === undefined ? "–" : show(value)}`;
  });
  return (
    <figure class="card chart">
      <figcaption>{title}</figcaption>
      <div ref={holder} role="img" aria-label={`${title}, now: ${last.join(", ")}`} />
      <ul class="legend">
        {series.map((one, i) => {
          const value = one.values[one.values.length - 1];
          return (
            <li key={one.name}>
              <span class="swatch" style={{ background: LINES[i % LINES.length] ?? "#000" }} />
              {one.name} <span class="muted">{value === null || value === undefined ? "–" : show(value)}</span>
            </li>
          );
        })}
      </ul>
    </figure>
  );
}
