/** Layers × experts on a canvas, with a cell that keyboard or pointer choose. */

import { useEffect, useRef, useState } from "preact/hooks";
import { css, type Rgb } from "./colours";

interface Props {
  rows: string[];
  columns: number;
  label: string;
  colour: (row: number, column: number, background: Rgb) => Rgb;
  detail: (row: number, column: number) => string;
  /** Changes when `colour` paints something else. */
  version: string;
}

const MOVES: Record<string, [number, number]> = {
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
};

function background(element: Element): Rgb {
  const found = /(\d+), ?(\d+), ?(\d+)/.exec(getComputedStyle(element).backgroundColor);
  return found === null ? [255, 255, 255] : [Number(found[1]), Number(found[2]), Number(found[3])];
}

export function cellHeight(width: number, rows: number, columns: number): number {
  return Math.max(5, Math.min(26, Math.round(width / columns), Math.round(560 / Math.max(1, rows))));
}

export function Grid({ rows, columns, label, colour, detail, version }: Props) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [width, setWidth] = useState(0);
  const [scheme, setScheme] = useState(0);
  const [at, setAt] = useState<[number, number] | null>(null);
  const high = cellHeight(width, rows.length, columns);

  useEffect(() => {
    const element = canvas.current;
    if (element === null) return;
    const observer = new ResizeObserver(() => {
      setWidth(element.clientWidth);
    });
    observer.observe(element);
    setWidth(element.clientWidth);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const changed = () => {
      setScheme((count) => count + 1);
    };
    dark.addEventListener("change", changed);
    return () => {
      observer.disconnect();
      dark.removeEventListener("change", changed);
    };
  }, []);

  useEffect(() => {
    const element = canvas.current;
    const context = element?.getContext("2d");
    if (!element || !context || width === 0) return;
    const started = performance.now();
    const ratio = devicePixelRatio;
    element.width = Math.round(width * ratio);
    element.height = Math.round(rows.length * high * ratio);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const wide = width / columns;
    const gap = wide > 8 ? 1 : 0;
    const behind = background(element);
    for (let row = 0; row < rows.length; row++) {
      for (let column = 0; column < columns; column++) {
        context.fillStyle = css(colour(row, column, behind));
        context.fillRect(column * wide, row * high, wide - gap, high - (high > 6 ? 1 : 0));
      }
    }
    if (at !== null) {
      context.lineWidth = 2;
      context.strokeStyle = getComputedStyle(element).color;
      context.strokeRect(at[1] * wide - 1, at[0] * high - 1, wide + 1, high + 1);
    }
    element.dataset.drawn = (performance.now() - started).toFixed(1);
  }, [width, scheme, version, at, rows.length, columns]);

  function choose(row: number, column: number): void {
    setAt([Math.min(rows.length - 1, Math.max(0, row)), Math.min(columns - 1, Math.max(0, column))]);
  }

  function onKey(event: KeyboardEvent): void {
    const move = MOVES[event.key];
    if (move === undefined) return;
    event.preventDefault();
    const [row, column] = at ?? [0, 0];
    choose(at === null ? 0 : row + move[0], at === null ? 0 : column + move[1]);
  }

  function onPointer(event: PointerEvent): void {
    const box = (event.currentTarget as HTMLCanvasElement).getBoundingClientRect();
    choose(
      Math.floor((event.clientY - box.top) / high),
      Math.floor(((event.clientX - box.left) / box.width) * columns),
    );
  }

  return (
    <div class="grid">
      <canvas
        ref={canvas}
        tabIndex={0}
        role="application"
        aria-label={`${label}. Arrow keys choose a position; what it is stands below.`}
        aria-describedby="grid-detail"
        style={{ height: `${String(rows.length * high)}px` }}
        onKeyDown={onKey}
        onFocus={() => {
          if (at === null) choose(0, 0);
        }}
        onPointerMove={onPointer}
        onPointerDown={onPointer}
      />
      <p id="grid-detail" class="detail" aria-live="polite">
        {at === null
          ? `${String(rows.length)} layers from top to bottom, ${String(columns)} experts from left to right. Point at one.`
          : `Layer ${rows[at[0]] ?? ""}, expert ${String(at[1])}: ${detail(at[0], at[1])}`}
      </p>
    </div>
  );
}
