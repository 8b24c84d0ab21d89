-- Say that the log is alive, how far it goes, and which beat a majority of regions has confirmed.
-- KEYS: beat, epoch, log. ARGV: number, nonce, interval (ms).
-- Returns {1 if written, 0 if a beat of this epoch is young enough; the server's time (ms)}.
local refusal = check_epoch(KEYS[2], ARGV[1], ARGV[2])
if refusal then
  return refusal
end

local now_ms = server_ms()
local held = redis.call('HMGET', KEYS[1], 'nonce', 'at')
if held[1] == ARGV[2] then
  local age_ms = tonumber(now_ms) - tonumber(held[2])
  if age_ms >= 0 and age_ms < 0.75 * tonumber(ARGV[3]) then
    return {0, now_ms}
  end
end

write_beat(KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[2], now_ms)
return {1, now_ms}
