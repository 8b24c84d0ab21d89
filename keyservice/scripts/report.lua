-- Put a keeper's evidence in place. KEYS: region, epoch. ARGV: number, nonce, keeper_id, held (stream id), commit,
-- beat_n (-1: none), beat_at, beat_position, version. Within one nonce nothing moves back, and a beat once confirmed
-- stays so: a report that was overtaken changes nothing. Nor does one of a second keeper while the region's other one is
-- alive (it reported less than 5 s ago). Returns {1}.
local refusal = check_epoch(KEYS[2], ARGV[1], ARGV[2])
if refusal then
  return refusal
end

local function before(a, b)
  local a_number, a_seq = string.match(a, '^(%d+)-(%d+)$')
  local b_number, b_seq = string.match(b, '^(%d+)-(%d+)$')
  a_number, b_number = tonumber(a_number), tonumber(b_number)
  return a_number < b_number or (a_number == b_number and tonumber(a_seq) < tonumber(b_seq))
end

local report = {held = ARGV[4], commit = ARGV[5], beat_n = ARGV[6], beat_at = ARGV[7], beat_position = ARGV[8]}
local held = redis.call('HMGET', KEYS[1], 'keeper_id', 'number', 'nonce', 'held', 'commit', 'beat_n', 'beat_at',
  'beat_position')
local now_ms = server_ms()
local alive = redis.call('HMGET', KEYS[1], 'at', 'empty')
if held[1] and held[1] ~= ARGV[3] and held[2] and alive[2] ~= '1'
  and math.abs(tonumber(now_ms) - tonumber(alive[1] or '0')) < 5000 then
  return redis.error_reply('TRUST_KEEPER another keeper of this region reports')
end
if held[1] == ARGV[3] and held[2] == ARGV[1] and held[3] == ARGV[2] then
  if before(report.held, held[4]) then
    report.held = held[4]
  end
  if tonumber(report.commit) < tonumber(held[5]) then
    report.commit = held[5]
  end
  if tonumber(report.beat_n) < tonumber(held[6]) then
    report.beat_n, report.beat_at, report.beat_position = held[6], held[7], held[8]
  end
end
redis.call('HSET', KEYS[1], 'keeper_id', ARGV[3], 'number', ARGV[1], 'nonce', ARGV[2], 'held', report.held,
  'commit', report.commit, 'beat_n', report.beat_n, 'beat_at', report.beat_at, 'beat_position', report.beat_position,
  'at', now_ms, 'version', ARGV[9])
redis.call('HDEL', KEYS[1], 'empty')
return {1}
